"""The table of Molchanov et al. 2016: what it is made of, on networks that take no time."""

import json

import torch
from rich.console import Console

from benchmarks.data import Batches
from benchmarks.molchanov2016 import PRINTED, compare, save, small_vgg, table_of, trained_vgg
from benchmarks.overhead import measure


def test_the_vgg_maps_images_to_classes():
    """Seven convolutions and two linear layers, as narrow as told."""
    model = small_vgg()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert [len(model.get_parameter(f"conv{i}.weight")) for i in range(1, 8)] == [16, 16, 32, 32, 64, 64, 64]


def test_a_trained_vgg_is_loaded_again(tmp_path):
    """Where an earlier run left its weights, no data is asked for."""
    model = small_vgg()
    torch.save(model.state_dict(), tmp_path / "vgg.pt")
    again = trained_vgg(tmp_path / "nowhere", 1, 1, tmp_path / "vgg.pt")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_criteria_are_compared_and_kept(tmp_path):
    """Ours stand beside the paper's, and a later run on another network leaves them in the file."""
    batches, others = (Batches(torch.randn(4, 3, 32, 32), torch.arange(4), 2) for _ in range(2))
    ignore = ["fc1", *(f"conv{i}" for i in range(2, 8))]
    result = compare("vgg", small_vgg(), batches, others, ignore, ["taylor_activations", "random"], False)
    assert list(result["correlations"]) == ["oracle on other images", "taylor_activations", "random"]
    figures = result["correlations"]["taylor_activations"]
    assert set(figures) == {"per_layer", "all_layers", "all_layers_l2"}
    assert all(-1 <= figure <= 1 for figure in figures.values())
    console = Console(width=150, record=True)
    with console.capture() as printed:
        console.print(table_of([result]))
    assert " 0.73 |  0.14 |  0.73" in printed.get()
    for key in ("one", "two"):
        save({key: result}, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["results"] == {"one": result, "two": result}
    assert found["printed"].keys() == PRINTED.keys()


def test_overhead_is_measured_against_a_bare_step():
    """Both forms are set beside the same step without them."""
    result = measure(steps=1, batch=2, device="cpu")
    assert result["ratios"].keys() == {"weights", "activations"}
    assert result["bare_step_ms"] > 0
