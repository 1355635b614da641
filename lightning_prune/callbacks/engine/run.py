"""The life of a run in which something leaves the model: when, what is logged, what a checkpoint remembers."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.averaging import keep_metadata_, let_copies_follow, refuse_order
from lightning_prune.callbacks.engine.example_inputs import inputs_of
from lightning_prune.callbacks.engine.packages import AnyCallback
from lightning_prune.callbacks.engine.probation import guards
from lightning_prune.callbacks.engine.processes import refuse_early_end, refuse_uneven
from lightning_prune.callbacks.engine.refusals import refuse_misfits, refuse_run, refuse_short, refuse_twins
from lightning_prune.callbacks.engine.reporting import call_of, new_metrics, report
from lightning_prune.model.errors import PruningError
from lightning_prune.model.inference_mode import refuse_inference_tensors
from lightning_prune.reports import History
from lightning_prune.surgery import Kept, drop_unused_recipe_, recipe_of, take_shapes_

__all__ = ["Course", "Pruning", "pruning_callbacks"]


@dataclass
class Course:
    """How far pruning has come in a run."""

    progress: float = 0.0  # share of the schedule's cuts, made so far
    ceiling: float = 1.0  # of the same, beyond which a guard lets nothing go
    epoch: int = -1  # the last one whose start was seen
    begun: bool = False
    reported: bool = False
    seen: bool = False  # whether forward took a batch of those that it will be run on
    unlogged: bool = False  # whether something changed since the last log
    blind: bool = False  # whether a cut is due for which nothing was seen to decide by


class Pruning(AnyCallback, ABC):
    """Base of the callbacks that prune: it says when, they say what."""

    def __init__(self, schedule: Schedule | None) -> None:
        """Check the schedule and keep it."""
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(
                f"{type(self).__name__}(schedule={schedule!r}): pass OneShot, Linear, Cubic or another Schedule."
            )
        self.schedule: Schedule = schedule if schedule is not None else OneShot()
        self._course = Course()
        self._joined = False  # a run
        self._history = History()
        self._logged: dict[str, Any] = {}  # before the validation that runs
        self._module: weakref.ref[LightningModule] | None = None
        self._hooks: list[Any] = []

    # What

    @abstractmethod
    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before anything is set up, a run in which this way of pruning cannot work."""

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> bool:
        """Look at the model, and refuse what cannot be reached before epochs are spent on it.

        Called when training starts, without a batch; while that returns False, with every batch.
        """

    @abstractmethod
    def reach(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Let leave what is due after a share of the schedule's cuts."""

    @abstractmethod
    def metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return what is logged, by name; of several callbacks of a kind one speaks for all."""

    @abstractmethod
    def describe(self, trainer: Trainer, pl_module: LightningModule, history: History) -> None:
        """Write into a history how the model stands; of several callbacks of a kind one speaks for all."""

    @abstractmethod
    def remembered(self) -> dict[str, Any]:
        """Return what a checkpoint shall remember, as plain numbers and tensors."""

    @abstractmethod
    def take_up(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""

    @abstractmethod
    def forget(self) -> None:
        """Start anew: the module is another one."""

    @abstractmethod
    def undoable(self) -> dict[str, Any]:
        """Return what the next cut is about to change of this callback's own state."""

    @abstractmethod
    def undo(self, pl_module: LightningModule, undoable: dict[str, Any]) -> None:
        """Follow a model that was given back what the last cut took."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Name, stably from run to run, the class and the parts of the model that this callback is about."""

    @property
    def history(self) -> History:
        """What became of the model so far; of several pruning callbacks of a trainer the last keeps it for all."""
        return self._history

    @property
    def ready(self) -> bool:
        """Whether enough was gathered to decide by."""
        return True

    @property
    def units(self) -> int:
        """How many units leave in all, for schedules that count them."""
        return 0

    @property
    def cuts(self) -> Schedule:
        """The schedule, now that it is known how many units leave in all."""
        return self.schedule.over(self.units)

    @property
    def due(self) -> bool:
        """Whether something is still to leave."""
        return self._course.progress < self._course.ceiling

    def will_run_on_batches(self, pl_module: LightningModule) -> bool:
        """Tell whether the module's forward will be run on training batches beside the training."""
        return False

    def follow(self, kept: Kept) -> None:
        """Follow a cut that another callback has made."""

    def detach(self, pl_module: LightningModule) -> None:
        """Take every hook off the model and its optimizers."""

    def __repr__(self) -> str:
        """Return the call that makes this callback."""
        given = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # When

    @property
    def state_key(self) -> str:
        """Tell callbacks of one class apart in checkpoints by what they are about."""
        # A Trainer refuses equal keys when it is made, and does not say what to do; setup does.
        return self.about if self._joined else f"{self.about} {id(self)}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the model take the shapes of any checkpoint that is loaded."""
        self._joined = True
        if stage == "fit":
            refuse_twins(self, pruning_callbacks(trainer))
            refuse_inference_tensors(type(self).__name__, pl_module)
            self.refuse(trainer, pl_module)
            refuse_order(type(self).__name__, trainer.callbacks, self)  # type: ignore[attr-defined]
            refuse_run(type(self).__name__, self.schedule, trainer)
        if self._module is None or self._module() is not pl_module:
            self._course, self._history = Course(), History()
            self.forget()
            self._module = weakref.ref(pl_module)
        self._course.begun, self._course.reported, self._course.epoch = False, False, -1
        self._detach(pl_module)
        recipe_of(pl_module)
        self._hooks = [
            pl_module.register_load_state_dict_pre_hook(take_shapes_),
            *let_copies_follow(trainer, pl_module),
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model, and refuse a training that ends before the schedule does."""
        refuse_short(type(self).__name__, self.schedule, trainer)
        refuse_misfits(type(self).__name__, trainer, pl_module)
        refuse_uneven(type(self).__name__, trainer)
        self._history.stopped = ""
        self._begin(trainer, pl_module, None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due before this epoch: no graph is alive, and the last checkpoint holds what was validated."""
        if self._course.begun:
            self._advance(trainer, pl_module)
            if not self._changes_within_epochs(trainer):
                self._log(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due before this step; catch up where the epoch's start was not seen or came too early.

        The count of steps moves after an optimizer's step alone, so nothing falls into a window of accumulation.
        """
        if not self._course.begun:
            self._begin(trainer, pl_module, batch)
        if not self._course.begun:
            return
        if not self._course.seen and self.due and self.will_run_on_batches(pl_module):
            next(inputs_of(pl_module, [batch]))  # refuses what forward does not take before steps are spent on it
            self._course.seen = True
        if self.schedule.by == "steps" or self._course.epoch != trainer.current_epoch:
            self._advance(trainer, pl_module)
        self._log(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Refuse to go on to the next cut where processes part: one for all callbacks."""
        if next((callback for callback in pruning_callbacks(trainer) if callback.due), None) is self:
            refuse_early_end(type(self).__name__, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what was logged before."""
        self._logged = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what this validation logged."""
        logged, self._logged = self._logged, {}
        if trainer.state.fn == "fit" and not trainer.sanity_checking and pruning_callbacks(trainer)[-1] is self:
            self._history.note_metrics(trainer.current_epoch, trainer.global_step, new_metrics(trainer, logged))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what became of the model, once for all callbacks: in the terminal and to the loggers."""
        for guard in guards(trainer):
            guard.judge(trainer, pl_module)
        course = self._course
        if self.due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            missed = (
                " Another was due, but nothing finite was seen to score by: are losses NaN?" if course.blind else ""
            )
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {self.schedule} did; {course.progress:.0%} of its cuts "
                f"were due and were made.{missed}"
            )
        elif course.begun and course.ceiling < 1.0:
            rank_zero_warn(
                f"{type(self).__name__}: {course.progress:.0%} of the cuts of {self.schedule} stand; MetricGuard took "
                "back what came after."
            )
        if course.begun and self._begun(trainer)[-1] is self:
            logged = self._history.left
            changed = self._note(trainer, pl_module) != logged  # by a cut after the last step, or one taken back
            if trainer.is_global_zero:
                report(trainer, self._history, changed)
        course.reported = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the model; one that was cut goes on to say so in its state dicts."""
        self._detach(pl_module)
        drop_unused_recipe_(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave as after a run that ended well, since Lightning tears down nothing here, and report what was cut."""
        self._detach(pl_module)
        drop_unused_recipe_(pl_module)
        course, history = self._course, self._history
        if course.begun and not course.reported and history.moments and self._begun(trainer)[-1] is self:
            course.reported = True
            name, epoch, step = type(exception).__name__, trainer.current_epoch, trainer.global_step
            history.stopped = f"{name} in epoch {epoch}, after step {step}"
            if trainer.is_global_zero:
                report(trainer, history, unlogged=False, tables=isinstance(exception, KeyboardInterrupt))

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> None:
        """Begin, and refuse a training too short for as many cuts as it turns out to take."""
        self._course.begun = self.begin(trainer, pl_module, batch)
        if self._course.begun and self.cuts is not self.schedule:
            refuse_run(type(self).__name__, self.cuts, trainer)
            refuse_short(type(self).__name__, self.cuts, trainer)

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due, unless a guard still waits to see what the last cut did."""
        on_probation = [guard.judge(trainer, pl_module) for guard in guards(trainer)]
        course = self._course
        moment = trainer.global_step if self.schedule.by == "steps" else trainer.current_epoch
        progress = min(self.cuts.progress(moment), course.ceiling)
        course.blind = progress > course.progress and not self.ready
        if progress > course.progress and self.ready and not any(on_probation):
            self.reach(trainer, pl_module, progress)
            course.progress, course.unlogged = progress, True
        if course.epoch != trainer.current_epoch:
            course.epoch, course.unlogged = trainer.current_epoch, True

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left; the last callback does so for all, since values logged twice would be averaged."""
        callbacks = pruning_callbacks(trainer)
        courses = [callback._course for callback in callbacks]
        if callbacks[-1] is not self or not all(course.begun for course in courses):
            return
        if not any(course.unlogged for course in courses):
            return
        for course in courses:
            course.unlogged = False
        values = self._note(trainer, pl_module)
        within = self._changes_within_epochs(trainer)
        pl_module.log_dict(values, on_step=within, on_epoch=not within, batch_size=1)

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Note how the model stands, and return what is left of it by the names under which it is logged."""
        values: dict[str, float] = {}
        for callback in self._begun(trainer):
            values |= callback.metrics(trainer, pl_module)
        history = self._history
        history.model = type(pl_module).__name__
        history.callbacks = [call_of(callback) for callback in pruning_callbacks(trainer)]
        history.note_left(trainer.current_epoch, trainer.global_step, values)
        for callback in self._begun(trainer):
            callback.describe(trainer, pl_module, history)
        return values

    def _begun(self, trainer: Trainer) -> list[Pruning]:
        return [callback for callback in pruning_callbacks(trainer) if callback._course.begun]

    def _changes_within_epochs(self, trainer: Trainer) -> bool:
        return any(callback.schedule.by == "steps" for callback in pruning_callbacks(trainer))

    # For guards

    def progress(self) -> dict[str, Any]:
        """Return how far pruning has come, for :meth:`go_back`."""
        return {"progress": self._course.progress, "own": self.undoable()}

    def go_back(self, pl_module: LightningModule, progress: dict[str, Any], halve: bool) -> None:
        """Follow a model that was given back what the last cut took; go on with half the step, or no further."""
        course = self._course
        step = course.progress - progress["progress"]
        course.progress, course.unlogged = progress["progress"], True
        if step > 0:
            course.ceiling = course.progress + (step / 2 if halve and step / 2 >= 0.01 else 0.0)
        self.undo(pl_module, progress["own"])

    # What a checkpoint remembers

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let averaged weights keep what tells their shapes, and let each way of pruning add what it must."""
        keep_metadata_(checkpoint)
        self.amend(trainer, checkpoint)

    def amend(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Change what :meth:`remembered` gave on this process into what all processes can take up."""

    def state_dict(self) -> dict[str, Any]:
        """Return how much has gone and of what, as plain numbers and tensors."""
        course, history = self._course, self._history.to_plain()
        return {"progress": course.progress, "ceiling": course.ceiling, "history": history, **self.remembered()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint remembers.

        Raises:
            PruningError: If something is missing there, or is not what it should be.
        """
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing:
            raise PruningError(
                f"{type(self).__name__}: the checkpoint does not hold its {', '.join(missing)}, so another version of "
                "it was saved. Load the weights alone, by load_from_checkpoint, and start a run from them."
            )
        try:
            progress, ceiling = float(state_dict["progress"]), float(state_dict["ceiling"])
            history = History.from_plain(state_dict["history"])
            self.take_up(state_dict)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self.forget()
            raise PruningError(
                f"{type(self).__name__}: what the checkpoint holds of it cannot be read ({error!r}): the file is "
                "damaged. Take up an earlier one."
            ) from error
        self._course.progress, self._course.ceiling, self._history = progress, ceiling, history

    def _detach(self, pl_module: LightningModule) -> None:
        self.detach(pl_module)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, to which the trainer's ``log`` and ``log_dict`` lead too."""
        own = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**own, "_module": None, "_hooks": []}


def pruning_callbacks(trainer: Trainer) -> list[Pruning]:
    """Return the trainer's callbacks that prune."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Pruning)]  # type: ignore[attr-defined]
