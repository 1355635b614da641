"""What a run logs and prints of what has left."""

import csv

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_prune import FilterL1Pruning, Linear, count_flops
from tests.runs import IMAGE, Known, Net, Watch, fit, net


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
def test_logged_values_are_those_of_the_model(kind):
    """Every epoch from the first logs params, FLOPs, their shares of the dense model and the share of filters gone."""
    watch = Watch()
    module = net(kind)
    params, flops = sum(p.numel() for p in module.parameters()), count_flops(module, IMAGE).total
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(1, 3)), watch, max_epochs=5)
    assert [logged["prune/params"] for logged in watch.logged] == watch.params
    assert [logged["prune/flops"] for logged in watch.logged] == watch.flops
    for logged, seen in zip(watch.logged, watch.widths, strict=True):
        assert logged["prune/params_kept"] == pytest.approx(logged["prune/params"] / params)
        assert logged["prune/flops_kept"] == pytest.approx(logged["prune/flops"] / flops)
        assert logged["prune/sparsity"] == pytest.approx(1 - sum(seen.values()) / 24)
    assert watch.logged[0]["prune/sparsity"] == 0 and watch.logged[-1]["prune/sparsity"] == pytest.approx(0.5)


def test_loggers_and_monitors_see_the_values(tmp_path):
    """A logger writes them once an epoch; ModelCheckpoint and EarlyStopping can monitor them."""
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="prune/flops_kept", save_top_k=-1, mode="min")
    stop = EarlyStopping("prune/sparsity", mode="max", patience=10, stopping_threshold=0.45)
    logger = CSVLogger(tmp_path)
    made = fit(
        net(), FilterL1Pruning(amount=0.5, schedule=Linear(0, 3)), saved, stop,
        val=True, logger=logger, enable_checkpointing=True, max_epochs=6, log_every_n_steps=1,
    )  # fmt: skip
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("prune/params")]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]  # 0.5 is reached at epoch 3: EarlyStopping stops
    assert made.current_epoch == 4
    sparsities = [float(row["prune/sparsity"]) for row in rows]
    assert sparsities == sorted(sparsities) and sparsities[0] > 0 and sparsities[-1] == pytest.approx(0.5)
    assert [float(score) for score in saved.best_k_models.values()] == pytest.approx(
        [float(row["prune/flops_kept"]) for row in rows]
    )
    assert saved.best_model_path.endswith("epoch=3.ckpt")


def test_table_shows_the_widths(capsys):
    """At the end of training a table shows what became of every layer."""
    fit(net(), FilterL1Pruning(amount=0.5))
    shown = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert "Kept: 32.7% of params, 31.8% of FLOPs" in shown
    assert "8 → 4" in lines["first"] and "6 → 3" in lines["second"] and "10 → 5" in lines["hidden"]
    assert "33 → 18" in lines["head"] and "5,184 → 2,592" in lines["first"]
