"""The examples run and show what they promise."""

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def shown(script: str, *args: str) -> str:
    """What an example prints."""
    return printed(str(EXAMPLES / script), *args)


def printed(*args: str) -> str:
    """What Python prints, in the folder of the examples."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *args], cwd=EXAMPLES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_transformer_loses_heads_and_hidden_units():
    """Of the transformer whole heads and hidden units leave until 60 % of its FLOPs are left."""
    found = re.search(r"([\d.]+)% of the FLOPs left; heads \[(\d), (\d)\]", shown("transformer.py", "--epochs", "12"))
    assert float(found[1]) <= 60.0 and max(int(found[2]), int(found[3])) < 6


@pytest.mark.slow
def test_surgery_keeps_what_magnitude_loses():
    """With nine of ten weights zeroed at once, surgery keeps the accuracy within 5 points; magnitude does not."""
    text = shown("one_shot.py")
    dense = float(re.search(r"dense: ([\d.]+)%", text)[1])
    by_magnitude, by_surgery = map(float, re.search(r"90% +│ ([\d.]+)% +│ ([\d.]+)%", text).groups())
    assert by_surgery > dense - 5 > by_magnitude


@pytest.mark.slow
def test_a_plain_loop_prunes():
    """In plain PyTorch a third of the FLOPs is left in the end, and the digits are still read."""
    last = shown("plain.py").splitlines()[-1]
    accuracy, left = map(float, re.search(r"([\d.]+)% right, ([\d.]+)% of the FLOPs left", last).groups())
    assert accuracy > 90 and left <= 35


@pytest.mark.slow
def test_fabric_prunes():
    """Under Fabric a fifth of the parameters is left in the end, and the digits are still read."""
    accuracy, left = map(
        float, re.search(r"([\d.]+)% right with ([\d.]+)% of the param", shown("fabric_loop.py")).groups()
    )
    assert accuracy > 85 and left <= 20


@pytest.mark.slow
def test_a_resnet_prunes_on_made_up_images(tmp_path):
    """Without data the example says so, prunes to half the FLOPs, and leaves its report."""
    text = shown("cifar10.py", "--epochs", "4", "--examples", "512", "--width", "8", "--out", str(tmp_path))
    assert "made-up" in text and float(re.search(r"right with ([\d.]+)% of the FLOPs", text)[1]) <= 50
    assert "latency left, batches of 64" in text and (tmp_path / "version_0" / "pruning.html").exists()


def test_cifar_10_is_read_from_its_archive(tmp_path, monkeypatch):
    """Records of the binary version are a label and three planes of pixels."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from cifar10 import from_archive

    rng = np.random.default_rng(0)
    parts = {"data_batch_1": 3, "data_batch_2": 2, "test_batch": 4}
    records = {name: rng.integers(0, 256, (count, 3073), dtype=np.uint8) for name, count in parts.items()}
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        for name, content in records.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = content.size
            archive.addfile(member, io.BytesIO(content.tobytes()))
    train, test = from_archive(tmp_path / "cifar.tar.gz")
    assert len(train) == 5 and len(test) == 4
    image, label = train[3]
    assert label == records["data_batch_2"][0, 0]
    assert image[1, 2, 5] == records["data_batch_2"][0, 1 + 1024 + 2 * 32 + 5]


@pytest.mark.slow
def test_a_run_from_yaml_and_its_report(tmp_path):
    """The YAML trains by LightningCLI; what the run leaves can be shown again and measured, by its config alone."""
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.enable_checkpointing", "true"]
    short = ["--trainer.max_epochs", "13", "--data.batch_size", "256"]
    shown("digits_cli.py", "fit", "--config", "digits.yaml", *short, *root)
    run = tmp_path / "lightning_logs" / "version_0"
    assert (run / "pruning.html").exists()
    classes = ["--model_class", "digits.DigitsNet", "--data_class", "digits.Digits"]
    text = printed("-m", "lightning_prune.cli", "report", str(run), "--latency", "--batch_sizes", "8", *classes)
    assert "Pruning steps" in text and "Latency, measured on cpu" in text


@pytest.mark.slow
def test_a_sweep_sets_options_by_name(tmp_path):
    """The example for sweeps takes the amount under a name of its own; the table shows that it was met."""
    quick = ["--trainer.max_epochs=13", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    shown("digits_sweep.py", "fit", "--pruning.amount=0.3", "--data.batch_size=256", *quick)
    history = json.loads((tmp_path / "lightning_logs" / "version_0" / "pruning.json").read_text())
    ((callback, target, asked, reached),) = history["goals"]
    assert (callback, target, asked) == ("FilterL1Pruning", "flops", 0.3) and 0.3 <= reached < 0.4
