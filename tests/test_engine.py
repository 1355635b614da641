"""All pruning callbacks of a Trainer share one engine: one history, one log, one set of example inputs."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    MetricGuard,
    OneShot,
    PruningError,
    TaylorFilterPruning,
)
from lightning_prune.callbacks.engine import run_log
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from tests.runs import Net, fit, net, watch_scores, widths
from tests.test_callback_contract import hooks_of, recipe_hooks


def pair():
    return FilterL1Pruning(0.5, schedule=OneShot(1)), IterativeMagnitudePruning(
        0.5, schedule=OneShot(2), scope="global"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_every_callback_has_the_complete_history(order):
    """Whatever the order, each callback's history holds the layers, the weights and the metrics of the run."""
    callbacks = pair()[::order]
    fit(net(), *callbacks, val=True)
    first, last = callbacks
    assert first.history is last.history
    assert first.history.layers["first"].now.width == 4 and len(first.history.weights) == 4
    assert any("val_loss" in moment.metrics for moment in first.history.moments)
    assert [call.partition("(")[0] for call in first.history.callbacks] == [type(c).__name__ for c in callbacks]


@pytest.mark.parametrize("order", [1, -1])
def test_every_callback_restores_the_history(order, tmp_path):
    """A checkpoint gives each callback the complete history, and the resumed run goes on with it."""
    whole = pair()[::order]
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(net(dropout=0.0), *whole, saver, enable_checkpointing=True)
    states = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    saved = [states[callback.state_key]["history"] for callback in whole]
    assert saved[0] == saved[1] and saved[0]["moments"]
    resumed = pair()[::order]
    fit(net(seed=5, dropout=0.0), *resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed[0].history is resumed[1].history
    assert resumed[0].history == whole[0].history


def test_values_are_logged_once():
    """However many callbacks prune, each value of an epoch is logged once, and is not an average."""
    logged = []

    class Logs(Net):
        def log_dict(self, values, **kwargs):
            logged.append((self.current_epoch, values))

    fit(net(Logs), *pair())
    assert [epoch for epoch, _ in logged] == list(range(len(logged)))


def test_a_callback_goes_on_in_another_company():
    """A callback that prunes a model with another, then alone, keeps its history; the other's stays as it was."""
    module, (one, other) = net(), pair()
    fit(module, one, other)
    before = copy.deepcopy(other.history)
    fit(module, one)
    assert other.history == before and one.history is not other.history
    assert one.history.layers["first"].before.width == 8 and one.history.layers["first"].now.width == 4


def test_another_model_has_a_history_of_its_own():
    """Callbacks that prune a second model know nothing of the first."""
    one, other = pair()
    fit(net(), one, other)
    fit(net(), one, other, max_epochs=3)
    assert one.history is other.history and widths(net())["first"] == one.history.layers["first"].before.width
    assert [moment.epoch for moment in one.history.moments] == sorted(m.epoch for m in one.history.moments)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_callbacks_share_nothing_with_the_run(copied):
    """Callbacks that are copied during a run, as for other processes, prune a model of their own together."""
    copies = []

    class Copies(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            copies[:] = copied(originals)

    originals = pair()
    fit(net(), *originals, Copies())
    assert copies[0].history == originals[0].history
    module = net()
    fit(module, *copies)
    assert widths(module)["first"] == 4
    assert copies[0].history is copies[1].history and copies[0].history is not originals[0].history


def test_inputs_found_by_one_serve_all():
    """Callbacks without example inputs are traced on those of another callback, or on one first batch for all."""
    given, without = TaylorFilterPruning({"first": 0.5}, scope="layer"), FilterL1Pruning(amount={"second": 0.5})
    fit(net(), given, without)
    assert given.engine is without.engine
    states = [callback.state_dict()["example"] for callback in (given, without)]
    assert torch.equal(*states) and states[0].shape[0] == 1


def test_a_report_that_fails_costs_nothing(monkeypatch):
    """What fails after training, in tables or counts, is warned of; the run ends well and hooks are gone."""

    def fails(*args):
        raise RuntimeError("no table today")

    module = net()
    monkeypatch.setattr(run_log, "report", fails)
    with pytest.warns(UserWarning, match="report of the pruning failed.*no table today"):
        made = fit(module, FilterL1Pruning(0.5))
    assert made.state.finished and widths(module)["first"] == 4
    assert sorted((path, name) for path, name, _ in hooks_of(module)) == recipe_hooks(module)


@pytest.mark.parametrize("name", ["acc [top-1]", "acc[/all]", "iou [a]/[b]", "err [/mm]"])
def test_names_with_brackets_are_printed(name, capsys):
    """Names of metrics are no markup."""

    class Named(Net):
        def validation_step(self, batch, batch_idx):
            self.log(name, 0.5)

    fit(net(Named), FilterL1Pruning(0.5, schedule=OneShot(1)), val=True)
    assert name.split()[-1] in capsys.readouterr().out


def test_a_refused_run_with_several_callbacks_leaves_nothing():
    """A run that the first callback refuses ends with its error, though the others were never set up."""
    with pytest.raises(PruningError, match="max_epochs"):
        fit(
            net(),
            FilterL1Pruning(0.5, schedule=OneShot(9)),
            IterativeMagnitudePruning(0.5, scope="global"),
            MetricGuard("x", 0.1),
        )


def test_callbacks_are_one_level_above_their_base():
    """Every callback that prunes derives from the one base, and overrides none of its hooks."""
    kinds = PruningCallback.__subclasses__()
    assert {kind.__name__ for kind in kinds if kind.__module__.startswith("lightning_prune")} == {
        "ExpertPruning", "FilterL1Pruning", "FilterPruning", "IterativeMagnitudePruning", "LayerPruning", "OBSOneShot",
        "TaylorFilterPruning",
    }  # fmt: skip
    functions = {name for name, value in vars(PruningCallback).items() if callable(value)} - {"__init__"}
    assert not any(functions & set(vars(kind)) for kind in kinds)


def test_scores_follow_cuts_of_another_callback():
    """What one callback gathers for units that stay counts on, whatever another callback removes meanwhile."""
    expansions = []

    class Expands(Net):
        def on_before_optimizer_step(self, optimizer):
            head = self.head.weight
            expansions.append((head * head.grad).detach().double().sum(0).square())

    taylor = TaylorFilterPruning({"hidden": 0.5}, schedule=OneShot(2))
    seen = watch_scores(taylor)
    module = net(Expands, dropout=0.0)
    fit(module, taylor, FilterL1Pruning({"first": 0.5}, schedule=OneShot(1)))
    ((scores, gathered),) = seen
    assert widths(module) == {"first": 4, "second": 6, "hidden": 5}
    assert {name: (len(total), count) for name, (total, count) in gathered.items() if "/" not in name} == {
        "first": (4, 8), "second": (6, 8), "hidden": (10, 8),
    }  # fmt: skip
    torch.testing.assert_close(scores["hidden"].double(), torch.stack(expansions[:8]).mean(0), rtol=1e-4, atol=1e-10)
