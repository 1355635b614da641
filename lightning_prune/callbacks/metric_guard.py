"""Takes a cut back when a metric does not recover from it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_prune.callbacks.engine.averaging import averaged_copies
from lightning_prune.callbacks.engine.guard import Guard
from lightning_prune.callbacks.engine.packages import is_a
from lightning_prune.callbacks.engine.processes import replicated_anew
from lightning_prune.callbacks.engine.pruning_callback import engine_of, pruning_callbacks
from lightning_prune.callbacks.engine.settings import compared_arguments, warn_of_changes
from lightning_prune.callbacks.engine.user_averages import bring_back_, remembered
from lightning_prune.model.errors import PruningError
from lightning_prune.reports.metric_mode import Mode, mode_by_name
from lightning_prune.surgery import restore_, take_snapshot


@dataclass
class _State:
    """Everything that changes in the life of a guard."""

    best: float | None = None
    last: float | None = None
    validations: int = 0  # since the last cut
    before: dict[str, Any] | None = None  # the model, its optimizers and the pruning as they were before the last cut
    cuts_back: int = 0


class MetricGuard(Guard):
    """Prune on only while a metric stays near its best; a cut that it does not recover from is taken back.

    Put it beside any of our pruning callbacks. ``patience`` validations after a cut, the metric must be within ``drop``
    of the best seen so far. If it is not, weights, structure and optimizer state return to what they were before that
    cut, when the next epoch starts or training ends, and pruning stops there or goes on with half the step.

    Args:
        monitor: Name of a metric that validation logs.
        drop: How far it may fall behind its best, in its own units.
        mode: Whether higher (``max``) or lower (``min``) is better. By default what a ModelCheckpoint or EarlyStopping
            of the Trainer with the same ``monitor`` says, else ``min`` where the name says loss, error, perplexity or
            the like, else ``max``; the log says which.
        patience: Validations after a cut until the metric must have recovered. Cuts that fall due meanwhile are made as
            one.
        then: ``stop`` ends pruning with the last good model; ``halve`` goes on by half the step at a time, until steps
            are below one hundredth of the amount.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> guard = MetricGuard(monitor="val_acc", drop=0.01)
    """

    def __init__(
        self,
        monitor: str,
        drop: float,
        mode: Literal["min", "max"] | None = None,
        patience: int = 1,
        then: Literal["stop", "halve"] = "stop",
    ) -> None:
        if not 0 <= drop < math.inf:
            raise ValueError(f"MetricGuard(drop={drop!r}): drop is a distance from the best, 0 or more.")
        if mode not in ("min", "max", None):
            raise ValueError(f"MetricGuard(mode={mode!r}): choose 'min', 'max' or None.")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"MetricGuard(patience={patience!r}): it counts validations, from 1.")
        if then not in ("stop", "halve"):
            raise ValueError(f"MetricGuard(then={then!r}): choose 'stop' or 'halve'.")
        self.monitor = monitor
        self.drop = drop
        self.mode = mode
        self.patience = patience
        self.then = then
        self._state = _State()
        self._mode: Mode | None = mode  # once a run began, the one that holds
        self._module: weakref.ref[LightningModule] | None = None  # which the state is of

    @property
    def state_key(self) -> str:
        """Name what is monitored, which tells two guards apart."""
        return self._generate_state_key(monitor=self.monitor)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to guard nothing, and forget what belongs to the last run."""
        if stage != "fit":
            return
        if not pruning_callbacks(trainer):
            raise PruningError(
                "MetricGuard guards a pruning callback, and there is none. Add FilterL1Pruning or another."
            )
        if not trainer.enable_validation:
            raise PruningError(self._never_validates("no validation data, no validation_step, or limit_val_batches=0"))
        if self._module is None or self._module() is not pl_module:
            self._state = _State()
            self._module = weakref.ref(pl_module)
        self._state.before = None  # optimizers of an earlier fit are gone; a checkpoint brings those of its own
        self._mode = self._mode_of_run(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse loaders without a batch, if they are known: Lightning makes them when the first validation is due."""
        if trainer.val_dataloaders is not None and not sum(trainer.num_val_batches):
            raise PruningError(self._never_validates("the validation loaders are empty"))

    def before_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember everything as it is, before the first of the cuts that fall on one moment, or before a fade."""
        self._state.validations = 0
        if self._state.best is None and self._state.before is None:
            rank_zero_warn(
                f"MetricGuard(monitor={self.monitor!r}): no validation came before this pruning step, so it is not "
                "known what the model reached until then, and the step can only be compared with validations after "
                "it. Let the schedule start at epoch 1 or later."
            )
        if self._state.before is not None:
            self._state.before["step"] = trainer.global_step
            return
        engine = engine_of(trainer)
        self._state.before = {
            **take_snapshot(pl_module, trainer.optimizers),
            "copies": [take_snapshot(copy, ()) for copy in averaged_copies(trainer)],
            "averages": remembered(engine.averages.moving(trainer, pl_module)),
            "step": trainer.global_step,
            "pruning": engine.rollback_states(trainer),
        }

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a metric that was not logged, before an epoch is spent; some log nothing while they are checked."""
        if self.monitor not in trainer.callback_metrics:
            rank_zero_warn(f"{self._not_logged(trainer)} Training stops after the first validation without it.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise PruningError(self._not_logged(trainer))
        state, value = self._state, float(trainer.callback_metrics[self.monitor])
        state.last, state.validations = value, state.validations + 1
        if state.best is None or self._behind(value, state.best) < 0:
            state.best = value

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last cut; callbacks that prune ask for this too, wherever they stand in the list."""
        self.judge(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last cut, so that training does not end with one that did harm; warn if it cannot be judged."""
        self.judge(trainer, pl_module)
        if self._state.before is not None:
            rank_zero_warn(
                f"MetricGuard(monitor={self.monitor!r}): training ended before the last pruning step was judged, after "
                f"{self._state.validations} of {self.patience} validations. It was not rolled back. Train for longer, "
                "validate more often, or lower patience."
            )

    def judge(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Roll the last cut back if the metric had its time and has not recovered; else forget what was before it."""
        state = self._state
        if state.before is None or engine_of(trainer).fading:  # what fades is judged after its cut
            return False
        if state.last is None or state.best is None or state.validations < self.patience:
            return state.before["step"] != trainer.global_step  # cuts of one moment stand together
        before, state.before = state.before, None
        harmed = math.isnan(state.last) or self._behind(state.last, state.best) > self.drop
        harmed = trainer.strategy.broadcast(harmed)
        place = "more than" if harmed else "within"
        why = f"{self.monitor} {state.last:g}, {place} {self.drop:g} behind the best, {state.best:g}"
        engine_of(trainer).log.note_decision(trainer, kept=not harmed, why=why)
        if harmed:
            self._take_back(trainer, pl_module, before)
        return False

    def _mode_of_run(self, trainer: Trainer) -> Mode:
        if self.mode is not None:
            return self.mode
        where = f"MetricGuard(monitor={self.monitor!r})"
        by_callback = _mode_by_callbacks(where, self.monitor, trainer.callbacks)  # type: ignore[attr-defined]
        mode, source = (mode_by_name(self.monitor), "its name") if by_callback is None else by_callback
        better = "lower" if mode == "min" else "higher"
        rank_zero_info(f"{where}: mode={mode!r}, {better} is better, by {source}. Pass mode= if that is wrong.")
        return mode

    def _never_validates(self, why: str) -> str:
        return (
            f"MetricGuard(monitor={self.monitor!r}): this run never validates ({why}), so no pruning step would be "
            "judged. Pass validation data, or leave the guard out."
        )

    def _not_logged(self, trainer: Trainer) -> str:
        logged = ", ".join(sorted(map(str, trainer.callback_metrics))) or "nothing"
        return f"MetricGuard(monitor={self.monitor!r}): validation logs {logged}. Name one of these."

    def _behind(self, value: float, best: float) -> float:
        return best - value if self._mode == "max" else value - best

    def _take_back(self, trainer: Trainer, pl_module: LightningModule, before: dict[str, Any]) -> None:
        self._state.cuts_back += 1
        engine = engine_of(trainer)
        with engine.whole("MetricGuard", trainer, pl_module):
            with replicated_anew("MetricGuard", trainer, pl_module):
                averages = engine.averages.moving(trainer, pl_module)
                restore_(pl_module, trainer.optimizers, before)
                bring_back_(averages, before["averages"])
                for copy, own in zip(averaged_copies(trainer), before["copies"], strict=True):
                    restore_(copy, (), own)
            engine.rollback(trainer, pl_module, before["pruning"], halve=self.then == "halve")
        rank_zero_info(
            f"MetricGuard: {self.monitor} was {self._state.last:g}, more than {self.drop:g} behind its best "
            f"{self._state.best:g}; the last cut was taken back."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best metric and, while a cut is on probation, what was before it."""
        state = {entry.name: getattr(self._state, entry.name) for entry in fields(_State)}
        return {**state, "asked": compared_arguments(self, None), "mode": self._mode}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model."""
        return {**self.__dict__, "_module": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a checkpoint holds."""
        warn_of_changes(self, state_dict["asked"])
        self._state = _State(**{entry.name: state_dict[entry.name] for entry in fields(_State)})
        if self._mode != state_dict["mode"]:
            self._state.best = None  # it was the worst


def _mode_by_callbacks(where: str, metric: str, callbacks: Iterable[Callback]) -> tuple[Mode, str] | None:
    """Return the mode under which ModelCheckpoint or EarlyStopping monitor a metric, and the name of the callback.

    Raises:
        PruningError: If they contradict each other.
    """
    found: dict[Mode, str] = {}
    for callback in callbacks:
        monitors = is_a(callback, "ModelCheckpoint", "EarlyStopping")
        if monitors and getattr(callback, "monitor", None) == metric:
            found.setdefault(callback.mode, type(callback).__name__)  # type: ignore[attr-defined]
    if len(found) > 1:
        modes = " and ".join(f"{name}(mode={mode!r})" for mode, name in found.items())
        raise PruningError(f"{where}: {modes} contradict. Set mode= of one of them right.")
    return next(iter(found.items()), None)
