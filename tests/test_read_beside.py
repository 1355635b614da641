"""Training data that remember their place: what a callback reads of them is not missing from the training."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

from lightning_prune import FilterPruning, OBSOneShot, OneShot
from tests.runs import trainer

EXAMPLES = 32  # of an epoch


def example(number):
    """Return inputs, the number of the example, and a label."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, generator=generator), torch.tensor(number), torch.tensor(number % 3)


class Counting(IterableDataset):
    """Goes on where it stopped, by a number of its own."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        for _ in range(EXAMPLES):
            self.at += 1
            yield example(self.at)


class Cursor:
    """A place in the data."""

    def __init__(self):
        self.at = torch.zeros(1, dtype=torch.int64)


class Pointing(Counting):
    """Keeps its place in a tensor of another object."""

    def __init__(self):
        self.cursor = Cursor()

    def __iter__(self):
        for _ in range(EXAMPLES):
            self.cursor.at += 1
            yield example(int(self.cursor.at))


class Listing(Counting):
    """Holds an iterator over a list."""

    def __init__(self):
        self.numbers = iter(list(range(1000)))

    def __iter__(self):
        for number in itertools.islice(self.numbers, EXAMPLES):
            yield example(number)


class Generating(Listing):
    """Holds a generator, which cannot be copied."""

    def __init__(self):
        self.numbers = (number for number in range(1000))


class Numbers(Dataset):
    """Examples by number, which any number of readers may share."""

    def __len__(self):
        return 1000

    def __getitem__(self, number):
        return example(number)

    def __deepcopy__(self, memo):
        raise MemoryError("the examples were copied")


class Resuming(Sampler):
    """Goes on where it stopped."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def __len__(self):
        return EXAMPLES

    def __iter__(self):
        for _ in range(EXAMPLES):
            self.at += 1
            yield self.at


class Loader:
    """A loader that is not torch's, and goes on where it stopped."""

    def __init__(self):
        self.data, self.cursor = Numbers(), Cursor()

    def __len__(self):
        return EXAMPLES // 8

    def __iter__(self):
        for _ in range(len(self)):
            self.cursor.at += 8
            rows = [self.data[int(self.cursor.at) + i] for i in range(8)]
            yield tuple(torch.stack(part) for part in zip(*rows, strict=True))


LOADERS = {
    "a number": lambda: DataLoader(Counting(), 8),
    "a tensor elsewhere": lambda: DataLoader(Pointing(), 8),
    "an iterator": lambda: DataLoader(Listing(), 8),
    "a sampler": lambda: DataLoader(Numbers(), 8, sampler=Resuming(Numbers())),
    "a sampler of batches": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(Resuming(Numbers()), 8, False)),
    "a loader": Loader,
    "shuffled": lambda: DataLoader(Numbers(), 250, shuffle=True),
}


class Remembering(pl.LightningModule):
    """Notes which examples it was trained on."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if self.training:
            self.seen += batch[1].tolist()
        return nn.functional.cross_entropy(self(batch[0]), batch[2])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def seen_by(loader, *callbacks):
    torch.manual_seed(0)
    module = Remembering()
    torch.manual_seed(1)
    trainer(*callbacks, max_epochs=2).fit(module, loader)
    return module.seen


READERS = {
    "obd": lambda: FilterPruning(0.5, criterion="obd", batches=2, schedule=OneShot(1)),
    "repair": lambda: FilterPruning(0.5, repair=True, batches=2, schedule=OneShot(1)),
    "obs": lambda: OBSOneShot(0.5, batches=2, epoch=1),
}


@pytest.mark.parametrize("made", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_training_sees_the_same_examples(made, reader):
    """With a callback that reads batches beside the training, each step gets the examples that it gets without."""
    assert seen_by(made(), reader()) == seen_by(made())


def test_what_cannot_be_copied_is_said():
    """A generator can be read once alone: a warning names its owner and says what to do."""
    with pytest.warns(UserWarning, match=r"Generating cannot be copied, .* Make it copyable"):
        seen_by(DataLoader(Generating(), 8), READERS["obd"]())
