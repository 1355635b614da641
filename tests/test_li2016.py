"""Table 1 of Li et al. 2016 is reproduced: by formula from the widths, and by cutting the networks themselves."""

import pytest
import torch

from benchmarks.li2016 import EXAMPLE, RECIPES, agreement, weighed
from lightning_prune import prune_filters

VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG16_SIDES = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]

# network: widths of VGG's convolutions, or of the first convolutions of a ResNet's blocks, stage by stage.
DENSE = {
    "VGG-16": VGG16,
    "ResNet-56": [[16] * 9, [32] * 9, [64] * 9],
    "ResNet-110": [[16] * 18, [32] * 18, [64] * 18],
}
PRUNED = {
    "VGG-16-A": [32, 64, 128, 128, 256, 256, 256, 256, 256, 256, 256, 256, 256],
    # Layers 2, 4, ... 18 | 20, ... 36 | 38, ... 54; those that the paper skips stay 16, 32 or 64 wide.
    "ResNet-56-A": [[14] * 7 + [16] + [14], [32] + [28] * 8, [64] + [57] * 7 + [64]],
    "ResNet-56-B": [[6] * 7 + [16] * 2, [32] + [22] * 6 + [32] + [22], [64] + [57] * 7 + [64]],
    # Layers 2, ... 36 | 38, ... 72 | 74, ... 108.
    "ResNet-110-A": [[8] * 17 + [16], [32] * 18, [64] * 18],
    "ResNet-110-B": [[8] * 17 + [16], [32] + [19] * 17, [64] + [44] * 17],
}
# network: multiply-adds and weights before, and after.
COUNTS = {
    "VGG-16-A": (313_463_808, 14_977_728, 206_279_680, 5_390_176),
    "ResNet-56-A": (125_485_696, 848_944, 112_435_840, 769_456),
    "ResNet-56-B": (125_485_696, 848_944, 90_907_264, 732_016),
    "ResNet-110-A": (252_887_680, 1_719_856, 212_779_648, 1_680_688),
    "ResNet-110-B": (252_887_680, 1_719_856, 155_124_352, 1_161_712),
}
# Three of the paper's percentages are ours with the second decimal cut off: 13.77, 38.66 and 32.45 %.
CUT_OFF = {("ResNet-56-B", "params_cut"), ("ResNet-110-B", "flops_cut"), ("ResNet-110-B", "params_cut")}

NAMES = [recipe.name for recipe in RECIPES]


def vgg_counts(widths):
    """Multiply-adds and weights of VGG-16 with 512 neurons before the classes."""
    weights = [9 * before * after for before, after in zip([3, *widths], widths, strict=False)]
    classifier = widths[-1] * 512 + 512 * 10
    flops = sum(weight * side**2 for weight, side in zip(weights, VGG16_SIDES, strict=True))
    return flops + classifier, sum(weights) + classifier


def resnet_counts(firsts):
    """Multiply-adds and weights of a ResNet with option-A shortcuts, from the widths of its first convolutions."""
    flops, params, stream = 9 * 3 * 16 * 32**2, 9 * 3 * 16, 16
    for stage, (out, side) in enumerate([(16, 32), (32, 16), (64, 8)]):
        for width in firsts[stage]:
            weights = 9 * stream * width + 9 * width * out
            flops, params, stream = flops + weights * side**2, params + weights, out
    return flops + 64 * 10, params + 64 * 10


def formula(widths):
    return resnet_counts(widths) if isinstance(widths[0], list) else vgg_counts(widths)


@pytest.mark.parametrize("name", NAMES)
def test_formula_gives_the_golden_counts(name):
    """The paper's recipes, read as kept widths, give these counts on paper and pencil."""
    dense = name.rpartition("-")[0]
    assert formula(DENSE[dense]) + formula(PRUNED[name]) == COUNTS[name]


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_golden_counts_are_the_printed_ones(recipe):
    """Every figure that the paper prints is ours, rounded; three percentages are cut off instead."""
    flops, params, flops_left, params_left = COUNTS[recipe.name]
    ours = {
        "flops": flops,
        "params": params,
        "flops_left": flops_left,
        "params_left": params_left,
        "flops_cut": 100 * (1 - flops_left / flops),
        "params_cut": 100 * (1 - params_left / params),
    }
    for name, printed in vars(recipe.printed).items():
        expected = "cut off" if (recipe.name, name) in CUT_OFF else "rounded"
        assert agreement(printed, ours[name]) == expected, name


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_cut_networks_have_the_golden_counts(recipe):
    """The library's cut leaves exactly the paper's network, proved, and it still runs."""
    model = recipe.build()
    before = weighed(model)
    report = prune_filters(model, EXAMPLE, amount=recipe.amounts)
    assert before + weighed(model) == COUNTS[recipe.name]
    assert report.proved
    assert report.params_after == sum(parameter.numel() for parameter in model.parameters())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("printed, value, expected", [
    ("13.7", 13.68, "rounded"),
    ("13.7", 13.77, "cut off"),
    ("13.7", 13.80, "no"),
    ("1.5e7", 14_986_176, "rounded"),
    ("1.25e8", 125_999_999, "cut off"),
])  # fmt: skip
def test_agreement(printed, value, expected):
    """Digits agree when rounding gives them; when only cutting off does, that is said."""
    assert agreement(printed, value) == expected
