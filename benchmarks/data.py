"""CIFAR-10, MNIST and a text as tensors in memory: images normalised and augmented a batch at a time, and pieces."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Batches", "augment", "cifar10", "data_module", "mnist", "pieces", "shakespeare"]


def data_module(folder: Path | str) -> ModuleType:
    """Import ``load.py`` from the data folder (its interface: see README.md).

    Raises:
        FileNotFoundError: If the folder holds no ``load.py``.
    """
    path = Path(folder) / "load.py"
    if not path.is_file():
        raise FileNotFoundError(f"--data {folder}: no load.py there; benchmarks/README.md says what it must offer.")
    spec = importlib.util.spec_from_file_location("benchmark_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar10(folder: Path | str, split: str, parts: int | None = None) -> tuple[Tensor, Tensor]:
    """Read one split of CIFAR-10, normalised as the pretrained networks expect.

    Args:
        folder: The data folder.
        split: ``"train"`` or ``"test"``.
        parts: How many parts of 5,000 images to read; all of them when None.

    Returns:
        Images, float32 ``(N, 3, 32, 32)``, and their classes, int64 ``(N,)``.
    """
    load = data_module(folder)
    images, labels = load.cifar10(split, parts=parts)  # uint8 (N, 32, 32, 3), int64 (N,)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (load.CIFAR10_MEAN, load.CIFAR10_STD))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return pixels.sub_(mean).div_(std).contiguous(), torch.from_numpy(labels)


def mnist(folder: Path | str, split: str) -> tuple[Tensor, Tensor]:
    """Read one split of MNIST, shifted and scaled to mean 0 and deviation 1 over all pixels of the training images.

    Args:
        folder: The data folder.
        split: ``"train"`` or ``"test"``.

    Returns:
        Images, float32 ``(N, 1, 28, 28)``, and their digits, int64 ``(N,)``.
    """
    images, labels = data_module(folder).mnist(split)  # uint8 (N, 28, 28), int64 (N,)
    pixels = torch.from_numpy(images).unsqueeze(1).float().div_(255)
    return pixels.sub_(0.1307).div_(0.3081), torch.from_numpy(labels)


def shakespeare(folder: Path | str) -> tuple[Tensor, Tensor, int]:
    """Read a text as numbers of its characters.

    Args:
        folder: The data folder.

    Returns:
        The first nine tenths, the last tenth, and how many different characters there are.
    """
    text = data_module(folder).tinyshakespeare()
    known = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    end = int(0.9 * len(numbers))
    return numbers[:end], numbers[end:], len(known)


def pieces(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    """Draw pieces of the text, ``(count, context + 1)``."""
    starts = torch.randint(len(text) - context - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


def augment(images: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Mirror half of the images, by chance, and crop each at a random place of its zero-padded self.

    Args:
        images: ``(N, C, H, W)``, normalised: the zeros laid around them are the mean colour.
        padding: Pixels of zeros on each side; a crop moves by up to that many pixels in each direction.
        generator: Source of the random choices.

    Returns:
        New images, ``(N, C, H, W)``.
    """
    n, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)  # (N, H)
    columns = torch.arange(width).expand(n, width)
    columns = left + torch.where(flipped, width - 1 - columns, columns)  # (N, W)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # (N, H + 2p, W + 2p, C): each pixel is one gather
    chosen = padded[torch.arange(n).view(n, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]  # (N, H, W, C)
    return chosen.permute(0, 3, 1, 2).contiguous()


class Batches:
    """An iterable of ``(images, labels)`` over tensors in memory; it may stand where a DataLoader stands.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
        batch_size: Images per batch; the last batch of a pass may be smaller.
        train: Shuffle before each pass and augment each batch.
        crop: Whether batches for training are augmented.
        seed: Passes with equal seeds are equal, whatever else draws random numbers.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, *, train: bool = False, seed: int = 0, crop: bool = True
    ):
        self.images, self.labels = images, labels
        self.batch_size, self.train, self.crop = batch_size, train, crop
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.images)
        order = torch.randperm(n, generator=self.generator) if self.train else torch.arange(n)
        for indices in order.split(self.batch_size):
            images = self.images[indices]
            yield (
                augment(images, generator=self.generator) if self.train and self.crop else images,
                self.labels[indices],
            )
