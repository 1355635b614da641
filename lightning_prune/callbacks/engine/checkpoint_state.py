"""Saves and restores what a checkpoint holds of a pruning callback; reads neither Trainer nor model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_prune.callbacks.engine.example_inputs import RunInputs
from lightning_prune.callbacks.engine.run_log import RunLog
from lightning_prune.callbacks.engine.strategy import Member
from lightning_prune.model.errors import PruningError
from lightning_prune.reports import History
from lightning_prune.surgery import recipe_of

__all__ = ["adopt_", "keep_hyperparameters_", "restore_", "state_to_save"]

_MEANINGLESS = {"gathered": {"criterion", "form"}, "early": {"rewind_to"}}
"""Entry of a state -> arguments without which it means nothing: sums for scores of another kind, another moment."""


def state_to_save(member: Member, log: RunLog, inputs: RunInputs) -> dict[str, Any]:
    """Return how much was pruned and of what, as plain numbers and tensors.

    Each callback's state holds the history and the example inputs of the run, so that each can be restored alone.
    """
    history = {**log.history.to_plain(), "facts": {}}  # equal runs have equal checkpoints, whenever they run
    shared = {"history": history, "outdated": list(log.outdated), **inputs.state_dict()}
    own = {"asked": member.asked_before or member.asked}
    return {**member.clock.state_dict(), **own, **shared, **member.strategy.state_dict()}


def keep_hyperparameters_(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Write the hyperparameters of the dense module into a checkpoint.

    A forward that reads ``self.hparams.width`` needs the pruned width there. The constructor needs the dense one: it
    makes other numbers from it, also of parts that were not pruned. Loading sets the pruned one again.
    """
    saved = checkpoint.get(pl_module.CHECKPOINT_HYPER_PARAMS_KEY)
    if not isinstance(saved, dict):
        return
    for path, name in recipe_of(pl_module).places:
        holder, *keys = name.split(".")
        if path == "" and holder == "_hparams" and keys and keys[0] in pl_module.hparams_initial:
            saved[keys[0]] = pl_module.hparams_initial[keys[0]]


def adopt_(callback: Callback, states: dict[str, Any], others: Iterable[Callback]) -> None:
    """Adopt a state that was saved under other parts of the model (``ignore``, ``parameters``, patterns).

    The key of a state names the parts, so without this the callback would start anew, and prune a second time.

    Raises:
        PruningError: If several callbacks could have saved it, or several states could be meant.
    """
    name, keys = type(callback).__qualname__, {other.state_key for other in others}
    if callback.state_key in states:
        return
    left = [key for key in states if key.startswith(name) and key[len(name) :][:1] == "{" and key not in keys]
    rivals = [key for key in keys if key.startswith(f"{name}{{") and key not in states]
    if len(left) == len(rivals) == 1:
        states[callback.state_key] = states.pop(left[0])
    elif left:
        raise PruningError(
            f"{name}: the checkpoint holds {' and '.join(left)}, and this run has {' and '.join(sorted(rivals))}, so "
            "it is not known which goes on where. Resume with the same ignore=, parameters= and patterns."
        )


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
        asked = dict(state["asked"])
        if asked.keys() != member.asked.keys():
            raise KeyError("asked")
        outdated = list(map(str, state["outdated"]))
        changed = {name for name, value in member.asked.items() if asked[name] != value}
        state = {**state, **{key: None for key, about in _MEANINGLESS.items() if key in state and changed & about}}
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
    member.asked_before = asked
    member.resumed = True
    inputs.example = state["example"]
