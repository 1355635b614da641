"""Networks of torchvision, where it is installed: each is cut, proved and keeps the shapes of its outputs."""

import importlib
import warnings

import pytest

from benchmarks.zoo import ENOUGH, ours, tried
from benchmarks.zoos import ZOOS


def build(name):
    """Build a network of torchvision, or skip where it is missing or made for another device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return ZOOS["torchvision"].build(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf", "swin_t", "vit_b_32",
     "densenet121", "convnext_tiny", "lraspp_mobilenet_v3_large", "mc3_18"],
)  # fmt: skip
def test_networks_of_torchvision_are_cut(name):
    """At 30 % of the channels a network proves, keeps its outputs' shapes and loses 15 % of its parameters."""
    found = tried(ours, lambda: build(name))
    assert "error" not in found and found["same shapes"] and found["kept"] <= ENOUGH
    assert not found["proof"].startswith("nothing")
