"""Networks of other libraries, where these are installed: each is cut, proved and keeps the shapes of its outputs."""

import importlib
import warnings

import pytest

from benchmarks.zoo import ENOUGH, checked, doubled, ours, tried
from benchmarks.zoos import ZOOS
from benchmarks.zoos.of_others import NETWORKS
from benchmarks.zoos.of_timm import FAMILIES
from lightning_prune import count_flops, prune_filters
from tests.counts import assert_counts_agree


def imported(library):
    """Import a library, or skip where it is missing or made for another device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{library} cannot be imported: {error}")


OF_LIBRARIES = pytest.mark.parametrize(
    ("zoo", "name"),
    [("torchvision", name) for name in (
        "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf", "swin_t", "vit_b_32",
        "densenet121", "convnext_tiny", "lraspp_mobilenet_v3_large", "mc3_18",
    )]
    + [("timm", name) for name in ("coat_tiny", "halonet_h1", "nf_regnet_b0", "res2next50", "shvit_s1", "skresnet18")]
    + [("transformers", name) for name in ("falcon", "longformer", "funnel", "deit", "levit", "mobilevitv2")],
)  # fmt: skip


@pytest.mark.slow
@OF_LIBRARIES
def test_multiply_adds_are_those_of_fvcore(zoo, name):
    """The label trace counts what fvcore counts, in every module, before a cut and after it."""
    imported("torchvision.models" if zoo == "torchvision" else zoo)
    model, inputs = ZOOS[zoo].build(name)
    assert_counts_agree(model, inputs)
    report = prune_filters(model, inputs, 0.3, progress=False)
    assert_counts_agree(model, inputs)
    assert report.flops_after == count_flops(model, inputs).total


@pytest.mark.slow
@OF_LIBRARIES
def test_networks_of_other_libraries_are_cut(zoo, name):
    """At 30 % of the channels a network proves, keeps its outputs' shapes and loses 15 % of its parameters."""
    imported("torchvision.models" if zoo == "torchvision" else zoo)
    found = tried(ours, lambda: ZOOS[zoo].build(name))
    assert "error" not in found and found["same shapes"] and found["kept"] <= ENOUGH
    assert not found["proof"].startswith("nothing")


WRITTEN = [name for name, (_, _, library) in NETWORKS.items() if not library]
"""Networks of the zoo that need no other library."""


@pytest.mark.parametrize("name", ["llama-reference", "gpt-attributes", "gpt-literal-heads", "gpt-literal-width"])
def test_networks_as_people_write_them_are_cut(name):
    """At 30 % of the channels a network as its authors wrote it loses 15 % of its parameters."""
    found = tried(ours, lambda: ZOOS["others"].build(name))
    assert "error" not in found and found["same shapes"] and found["kept"] <= ENOUGH


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "sngan-generator"])
def test_every_output_of_networks_as_people_write_them_is_right(name):
    """In float64 every module's output is made of the full network's, its pruned units silenced."""
    found = tried(checked, lambda: doubled(lambda: ZOOS["others"].build(name)))
    assert "error" not in found and found["wrong outputs"] == 0 and found["skipped outputs"] == 0
    assert found["equal outputs"] > 10


def test_networks_without_their_library_are_left_out(monkeypatch, capsys):
    """Where a library is not installed its networks are left out, and named."""
    monkeypatch.setattr("benchmarks.zoos.of_others._installed", lambda library: False)
    assert ZOOS["others"].names() == WRITTEN
    assert "gcn: left out, torch_geometric is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_every_family_of_timm_is_in_the_zoo():
    """For every file of timm that registers networks, the zoo names one of these."""
    registry = imported("timm.models._registry")
    families = {family: set(names) for family, names in registry._module_to_models.items() if names}
    assert families.keys() == FAMILIES.keys() and all(FAMILIES[family] in names for family, names in families.items())
