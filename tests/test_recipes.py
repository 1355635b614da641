"""The recipes run offline and keep their promises; those of packages that are not installed are skipped."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def needs(package):
    """Skip where a package is missing, or does not fit this build of torch."""
    try:
        __import__(package)
    except (ImportError, RuntimeError) as error:  # torchvision of another build of torch raises the latter
        pytest.skip(f"{package} cannot be imported here: {error}")


def shown(folder, recipe, *arguments):
    """What a recipe prints, run in a folder of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / f"recipe_{recipe}.py"), *arguments],
        cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224"])
def test_timm(model, tmp_path):
    """Half of the FLOPs leave, and the saved weights load into a full-size network."""
    needs("timm")
    text = shown(tmp_path, "timm", "--model", model)
    kept = float(re.search(r"([\d.]+)% of the FLOPs kept; loaded again: the same outputs", text)[1])
    assert 45 < kept <= 50


@pytest.mark.slow
def test_hugging_face(tmp_path):
    """What save_pretrained wrote is loaded by from_pretrained, at the pruned widths, with the same outputs."""
    needs("transformers")
    text = shown(tmp_path, "hugging_face", "--out", "models")
    found = re.findall(r"(\w+): ([\d.]+)% of the parameters kept; .* width (\d+), .*; the same outputs", text)
    assert [name for name, *_ in found] == ["classifier", "decoder"]
    assert all(50 < float(kept) <= 60 and int(width) < 128 for _, kept, width in found)
    assert (tmp_path / "models" / "decoder" / "config.json").exists()


@pytest.mark.slow
def test_detection(tmp_path):
    """A third of the detector's FLOPs leave, and it still detects."""
    needs("torchvision")
    found = re.search(r"([\d.]+)% of the FLOPs kept; \d+ boxes found", shown(tmp_path, "detection"))
    assert 60 < float(found[1]) <= 70


@pytest.mark.slow
@pytest.mark.parametrize("distil", [False, True])
def test_a_part_of_a_module(distil, tmp_path):
    """The encoder loses half of its FLOPs, the projection nothing; with distillation its loss is logged."""
    text = shown(tmp_path, "parts", *["--distil"] * distil)
    assert float(re.search(r"([\d.]+)% of the encoder's FLOPs kept; projection: 128 units", text)[1]) <= 50
    assert ("distillation loss" in text) == distil and (tmp_path / "encoder.pt").exists()


@pytest.mark.slow
def test_segmentation(tmp_path):
    """Half of the FLOPs of a U-Net leave, it still finds the discs, and the saved weights load."""
    needs("segmentation_models_pytorch")
    text = shown(tmp_path, "segmentation")
    kept, overlap = re.search(
        r"([\d.]+)% of the FLOPs kept; IoU ([\d.]+); loaded again: the same outputs", text
    ).groups()
    assert 45 < float(kept) <= 50 and float(overlap) > 0.5


@pytest.mark.slow
def test_forecasting(tmp_path):
    """A third of the parameters leave in a run that neuralforecast makes, and its own files load."""
    needs("neuralforecast")
    text = shown(tmp_path, "forecasting")
    kept, error = re.search(
        r"([\d.]+)% of the parameters kept; mean error ([\d.]+); loaded again: the same", text
    ).groups()
    assert 60 < float(kept) <= 67 and float(error) < 0.3
