"""Knows what a checkpoint holds of a pruning callback; knows neither Trainer nor model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.callbacks.engine.example_inputs import RunInputs
from lightning_prune.callbacks.engine.run_log import RunLog
from lightning_prune.callbacks.engine.strategy import Member
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import History

__all__ = ["restore_", "state_to_save"]


def state_to_save(member: Member, log: RunLog, inputs: RunInputs) -> dict[str, Any]:
    """Return how much was pruned and of what, as plain numbers and tensors.

    Each callback's state holds the history and the example inputs of the run, so that each can be restored alone.
    """
    shared = {"history": log.history.to_plain(), "outdated": list(log.outdated), **inputs.state_dict()}
    return {**member.clock.state_dict(), **shared, **member.strategy.state_dict()}


def restore_(member: Member, log: RunLog, inputs: RunInputs, state: Mapping[str, Any]) -> None:
    """Restore a saved state.

    Raises:
        PruningError: If something is missing there, or is not what it should be.
    """
    missing = sorted(state_to_save(member, log, inputs).keys() - state.keys())
    if missing:
        raise PruningError(
            f"{member.where}: the checkpoint does not hold its {', '.join(missing)}, so another version of "
            "it was saved. Load the weights alone, by load_from_checkpoint, and start a run from them."
        )
    try:
        history = History.from_plain(state["history"])
        outdated = list(map(str, state["outdated"]))
        member.strategy.load_state_dict(state)
        member.clock.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        member.strategy.reset()
        member.clock.reset()
        raise PruningError(
            f"{member.where}: what the checkpoint holds of it cannot be read ({error!r}): the file is "
            "damaged. Take up an earlier one."
        ) from error
    log.history, log.outdated = history, outdated
    inputs.example = state["example"]
