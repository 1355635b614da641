"""What follows a removed layer makes up for it."""

import copy

import torch
from torch import nn

from lightning_prune import prune_layers
from lightning_prune.surgery.pass_through import Skipped


class Images(nn.Module):
    """Residual blocks of convolutions with BatchNorm, each followed by a rectifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock() for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.blocks(self.stem(images).relu()).mean(dim=(2, 3)))


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        for norm in (self.norm, self.second):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.05, 0.3)

    def forward(self, x):
        return (x + self.second(self.two(self.norm(self.one(x)).relu()))).relu()


def test_repair_brings_outputs_back():
    """On fresh images outputs are much nearer to those of the whole model with the repair than without."""
    torch.manual_seed(0)
    whole, images = Images().eval(), torch.randn(256, 3, 8, 8)
    distances = []
    for repair in (False, True):
        model = copy.deepcopy(whole)
        given = [images[:64], images[64:128]]
        report = prune_layers(model, images[:2], 0.5, batches=given, repair=repair, progress=False)
        with torch.no_grad():
            distances.append(float((model(images[128:]) - whole(images[128:])).square().mean()))
        first = min(int(layer.path[-1]) for layer in report.removed)
        for name, value in model.state_dict().items():  # what runs before the first of them is as it was
            if name.startswith("stem") or name.startswith(tuple(f"blocks.{i}." for i in range(first))):
                assert torch.equal(value, whole.state_dict()[name])
    assert distances[1] < 0.5 * distances[0]
    assert report.repairs and all(repair.after <= repair.before + 1e-6 for repair in report.repairs)


def test_repair_is_exact_where_it_can_be():
    """Where the next branch can compute what the removed layer added, nothing is lost."""

    class Linearly(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=bias)

        def forward(self, x):
            return x + self.out(self.inner(x))

    torch.manual_seed(0)
    model = nn.Sequential(Linearly(True), Linearly(True), nn.Linear(4, 3))
    x = torch.randn(64, 4)
    before = model(x).detach()
    prune_layers(model, x, 0.4, batches=[x], repair=True, damping=0, ignore=["1"], progress=False)
    assert isinstance(model[0], Skipped)
    # Six numbers hold all four inputs, so that any affine function of them can be made of these six.
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
