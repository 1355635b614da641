"""Owns the log, the history and the report of a run; decides nothing about pruning."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_prune.callbacks.engine.remaining_costs import describe, measure, weights_bytes
from lightning_prune.callbacks.engine.reporting import comparing_checkpoints, guarded, log_left, new_metrics, report
from lightning_prune.callbacks.engine.settings import call_of, changed_arguments, facts_of_run
from lightning_prune.callbacks.engine.strategy import Member, Run
from lightning_prune.reports import Decision, History

_COSTS = {
    "prune/params_kept": "of the parameters",
    "prune/flops_kept": "of the FLOPs",
    "prune/latency_kept": "of the latency",
    "prune/nonzero_kept": "of the parameters unmasked",
}


class RunLog:
    """What is logged, kept and shown of a run, for all of its pruning callbacks together.

    Attributes:
        history: What became of the model so far.
        changed: Whether something changed since the last log.
        outdated: Best checkpoints, by the Trainer's ModelCheckpoints, from before the last pruning step.
    """

    def __init__(self) -> None:
        self.history = History()
        self.changed = False
        self.outdated: list[str] = []
        self._reported = False
        self._began = time.monotonic()
        self._pruning: list[Member] = []  # since the last log
        self._before: dict[str, Any] = {}  # what was logged before the validation that runs

    def start_run(self) -> None:
        """Expect another report."""
        self._reported = False

    def start_validation(self, trainer: Trainer) -> None:
        """Note what was logged before."""
        self._before = dict(trainer.callback_metrics)

    def end_validation(self, trainer: Trainer) -> None:
        """Write what this validation logged into the history."""
        before, self._before = self._before, {}
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.history.note_metrics(trainer.current_epoch, trainer.global_step, new_metrics(trainer, before))

    def start_training(self, run: Run) -> None:
        """Note the size of the model before anything is pruned, and what the report says of the run."""
        self.history.stopped = ""
        self.history.note_bytes(weights_bytes(run.module))
        self._began = time.monotonic()
        self.history.facts = facts_of_run()

    def log(self, run: Run) -> None:
        """Log what is left of the model, if something changed: at each step if steps can change it, else by epochs."""
        if self.changed:
            self.changed = False
            within = any(member.clock.schedule.by == "steps" for member in run.members)
            before, left = self.history.left, self._note(run)
            run.module.log_dict(left, on_step=within, on_epoch=not within, batch_size=1)
            pruning, self._pruning = self._pruning, []
            if left != before:  # small steps of a schedule may take nothing more
                self._say_pruned(run, pruning, left)

    def note_decision(self, trainer: Trainer, kept: bool, why: str) -> None:
        """Write into the history what a guard decided about the last pruning step."""
        self.history.decisions.append(Decision(trainer.current_epoch, trainer.global_step, kept, why))

    def warn_changes(self, run: Run) -> None:
        """Warn of arguments that are others than in the run that is resumed."""
        own = run.own
        changes = changed_arguments(own.asked_before or own.asked, own.asked)
        if changes:
            rank_zero_warn(
                f"{run.where}: other arguments than in the checkpoint: {changes}. From here on the new ones hold, for "
                "what is still to be pruned, and relative to the dense model; what was pruned already stays pruned."
            )

    def warn_held_back(self, run: Run) -> None:
        """Warn once that a pruning step waits for a guard, and will be merged with those that fall due meanwhile."""
        own = run.own
        if not own.held_back:
            own.held_back = True
            rank_zero_warn(
                f"{run.where}: a pruning step of {own.clock.schedule} is due before epoch {run.trainer.current_epoch}, "
                "but MetricGuard has not judged the last one yet. Steps that fall due until then are made as one. Set "
                "every= of the schedule to at least the patience of the guard to have each judged by itself."
            )

    def warn_unfinished(self, run: Run) -> None:
        """Warn if training ended before the schedule did, or a guard ended it."""
        own, clock = run.own, run.own.clock
        if clock.unfinished and not run.trainer.fast_dev_run:  # type: ignore[attr-defined]
            unseen = " Another was due, but nothing finite was seen to score by: are losses NaN?"
            rank_zero_warn(
                f"{run.where}: training ended before {clock.schedule} did; {clock.progress:.0%} of its cuts "
                f"were due and were made.{unseen if own.due_without_scores else ''}"
            )
        elif own.prepared and clock.stopped:
            rank_zero_warn(
                f"{run.where}: {clock.progress:.0%} of the cuts of {clock.schedule} stand; MetricGuard took "
                "back what came after."
            )

    def warn_untrained(self, own: Member, trainer: Trainer) -> None:
        """Warn if something was to be pruned and Lightning trained nothing, unless a Tuner only tries settings."""
        tries = any(getattr(callback, "_early_exit", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not tries and not own.prepared and (own.clock.unfinished or own.asks_for_other_amounts):
            rank_zero_warn(
                f"{own.where}: this run trained no batch, so it pruned nothing. Look at max_epochs (those that a "
                "checkpoint has had count), max_steps, limit_train_batches and the training data."
            )

    def start_step(self, run: Run) -> None:
        """Note who prunes, and which checkpoints are the best before a pruning step."""
        self._pruning.append(run.own)
        self.outdated = [callback.best_model_path for callback in comparing_checkpoints(run.trainer)]

    def _say_pruned(self, run: Run, pruning: Iterable[Member], left: Mapping[str, float]) -> None:
        """Say in a line for each callback that pruned what is pruned now, and what is left of the model."""
        costs = [f"{left[key]:.1%} {of_what}" for key, of_what in _COSTS.items() if key in left]
        where = f"before epoch {run.trainer.current_epoch}, step {run.trainer.global_step}"
        for member in pruning:
            goal = member.strategy.goal(replace(run, own=member))
            if goal is not None:
                done = f"{goal.reached:.1%} of the {goal.target} pruned, of {goal.asked:.1%} in the end"
                rank_zero_info(f"{member.where}, {where}: {done}; kept: {', '.join(costs)}.")

    def warn_outdated(self, run: Run) -> None:
        """Warn of checkpoints that are still the best and hold the model as it was before the last pruning step."""
        for callback in comparing_checkpoints(run.trainer):
            if callback.best_model_path and callback.best_model_path in self.outdated:
                rank_zero_warn(
                    f"{run.where}: the best checkpoint of {type(callback).__name__}(monitor={callback.monitor!r}), "
                    f"{callback.best_model_path}, was saved before the last pruning step, so it holds a larger model. "
                    "Use PruningCheckpoint of lightning_prune.callbacks, which compares checkpoints of one size."
                )

    def report_end(self, run: Run) -> None:
        """Report what became of the model: in the terminal and to the loggers."""
        self._reported = True
        with guarded("The report of the pruning failed"):
            logged = self.history.left
            unlogged = self._note(run) != logged  # by a pruning step after the last batch, or one rolled back
            if run.trainer.is_global_zero:
                if unlogged:
                    log_left(run.trainer, self.history)
                if _wanted(run):
                    report(run.trainer, self.history)

    def report_stop(self, run: Run, exception: BaseException) -> None:
        """Report what was pruned until an exception; tables are for those who stopped the run, not for errors."""
        if self._reported or not self.history.moments:
            return
        self._reported = True
        name, epoch, step = type(exception).__name__, run.trainer.current_epoch, run.trainer.global_step
        self.history.stopped = f"{name} in epoch {epoch}, after step {step}"
        if run.trainer.is_global_zero and _wanted(run):
            self._note_time()
            with guarded("The report of the pruning failed"):
                report(run.trainer, self.history, tables=isinstance(exception, KeyboardInterrupt))

    def _note_time(self) -> None:
        seconds = round(time.monotonic() - self._began)
        self.history.facts["training time"] = str(timedelta(seconds=seconds))

    def _note(self, run: Run) -> dict[str, float]:
        """Write into the history how the model stands; return what is left of it."""
        prepared = replace(run, members=tuple(member for member in run.members if member.prepared))
        values, history = measure(prepared), self.history
        history.model = type(run.module).__name__
        history.callbacks = [call_of(member.callback) for member in run.members]
        history.note_left(run.trainer.current_epoch, run.trainer.global_step, values)
        describe(prepared, history)
        self._note_time()
        return values


def _wanted(run: Run) -> bool:
    """Return whether no callback switched the report off."""
    return all(member.strategy.arguments.report for member in run.members)
