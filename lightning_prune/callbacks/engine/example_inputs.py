"""Finds, in a run, inputs that the model's forward or a step accepts: from user, module or first batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.callbacks.engine.packages import overrides
from lightning_prune.callbacks.engine.step import (
    Traced,
    call_silently,
    call_with_hooks,
    copied,
    has_hooks,
    instead_of_forward,
)
from lightning_prune.model.calls import ExampleInputs, Instead, hold_nothing, mode_of, refuse_shapeless, run, tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure.tensor_names import exchange_
from lightning_prune.surgery.attributes import attributes_set
from lightning_prune.surgery.cut import Cut

__all__ = [
    "RunInputs", "batch_as_inputs", "inputs_of", "is_plain", "on_device_of", "refuse_cut_steps", "refuse_steps_without",
    "step_on",
]  # fmt: skip

_INPUTS = (
    "image", "images", "img", "input", "inputs", "x", "pixel_values", "input_ids", "input_values", "input_features",
    "features", "data", "feat", "waveform", "audio", "video", "text", "tokens", "sequence", "signal",
)  # fmt: skip
_Parameters = Mapping[str, inspect.Parameter]


def on_device_of(trainer: Trainer, pl_module: LightningModule, inputs: ExampleInputs) -> ExampleInputs:
    """Bring the first process's inputs to the module's device and to the precision that its forward gets."""
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach(), inputs)
    inputs = trainer.strategy.broadcast(move_data_to_device(inputs, torch.device("cpu")))  # all decide on the same
    inputs = move_data_to_device(inputs, pl_module.device)
    return trainer.precision_plugin.convert_input(inputs)  # type: ignore[no-any-return]


def step_on(pl_module: LightningModule, batch: Any) -> ExampleInputs | None:
    """Return what runs a step of the module on a batch as it is, as training does; None if there is no such step."""
    return next((instead_of_forward(step, batch) for step in _steps(pl_module)), None)


def batch_as_inputs(pl_module: LightningModule, batch: Any, traced: Traced = "forward") -> tuple[str, ExampleInputs]:
    """Return what runs on a training batch, in words, and its inputs: one example for forward, all of it for a step.

    Tried in this order: forward on the first part of the batch, its named parts, all of it, and single tensors in it;
    then the training step and the validation step.

    Raises:
        PruningError: If nothing runs.
    """
    refuse_shapeless(pl_module)
    failures = []
    for expression, inputs in _ways(pl_module, batch, traced):
        one = None if isinstance(inputs, Instead) else _one_example(inputs)
        for found in (one, inputs):
            if found is None:
                continue
            failure = _failure(pl_module, found)
            if failure is None:
                return expression, found
        failures.append(f"{expression}: {failure}")
    raise PruningError(_nothing_runs(pl_module, failures))


def inputs_of(
    pl_module: LightningModule, batches: Iterable[Any], traced: Traced = "forward"
) -> Iterator[ExampleInputs]:
    """Yield what runs on each batch, whole, in the way in which the first of them runs: see :func:`batch_as_inputs`.

    Raises:
        PruningError: If nothing runs.
    """
    way: str | None = None
    for batch in batches:
        if way is None:
            way = _way(pl_module, batch, traced)
        yield next(inputs for expression, inputs in _ways(pl_module, batch, traced) if expression == way)


def _way(pl_module: LightningModule, batch: Any, traced: Traced) -> str:
    failures = []
    for expression, inputs in _ways(pl_module, batch, traced):
        failure = _failure(pl_module, inputs)
        if failure is None:
            return expression
        failures.append(f"{expression}: {failure}")
    raise PruningError(_nothing_runs(pl_module, failures))


def _nothing_runs(pl_module: LightningModule, failures: list[str]) -> str:
    """Say what was tried on a batch, and what to change."""
    name, tried = type(pl_module).__name__, "; ".join(failures)
    step = "let training_step return its loss and optimize automatically, or validation_step return a tensor"
    if not overrides(pl_module, "forward"):
        return f"{name} has no forward, and no step of it runs on the training batch ({tried}). L{step[1:]}."
    return (
        f"{name}.forward accepts nothing of the training batch, and no step of it runs on it ({tried}). "
        "Pass example_inputs=, or set the module's example_input_array, to what forward takes; or, where the callback "
        f"runs the model on training batches, {step}."
    )


def is_plain(inputs: ExampleInputs | None) -> bool:
    """Return whether a checkpoint that is loaded with ``weights_only=True`` may hold the inputs."""
    leaves = pytree.tree_leaves(inputs)
    return all(type(leaf) in (Tensor, bool, int, float, complex, str, bytes, type(None)) for leaf in leaves)


class RunInputs:
    """The example inputs of a run. One example of the first training batch is kept, which a resumed run may not see."""

    def __init__(self) -> None:
        """Start without an example."""
        self.example: ExampleInputs | None = None

    def find(
        self, pl_module: LightningModule, traced: Traced, given: Iterable[Any], batch: Any | None
    ) -> ExampleInputs | None:
        """Return what the model is to be traced on, or None if that is not known before the next batch.

        Args:
            pl_module: The module.
            traced: What of it is traced.
            given: What callbacks were given as ``example_inputs``, or None; the first counts.
            batch: The first training batch, once it is here.
        """
        if batch is not None and hold_nothing(batch):
            batch = None
        if traced != "forward":  # a whole batch is too much for a checkpoint: a resumed run takes its own first one
            return None if batch is None else instead_of_forward(traced, batch)
        has_forward = overrides(pl_module, "forward")
        known = [*given, pl_module.example_input_array if has_forward else None, self.example]
        found = next((inputs for inputs in known if inputs is not None), None)
        if found is not None and found is not self.example and not has_forward:
            raise PruningError(
                f"{type(pl_module).__name__} has no forward that could run on example_inputs. Leave them out: its step "
                "is then run on the first training batch."
            )
        if found is None and batch is not None:
            expression, self.example = batch_as_inputs(pl_module, batch)
            rank_zero_info(f"The structure of {type(pl_module).__name__} is traced on {expression}.")
            return self.example
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: the example, where a checkpoint may hold it."""
        return {"example": self.example if is_plain(self.example) else None}


def refuse_cut_steps(where: str, pl_module: LightningModule, batch: Any, cut: Cut, traced: Traced) -> None:
    """Refuse a cut if a step of the module runs on a training batch now, and would not with it: forward hides why.

    Raises:
        PruningError: With the error that training would end in.
    """
    runs: list[tuple[Traced, str, ExampleInputs]] = []
    for step in _steps(pl_module):
        runs.append((step, step, Instead(call_silently, (step, copied(batch)))))
        if step == "training_step" and has_hooks(pl_module):
            told = "training_step, with the hooks of the module around it,"
            runs.append((step, told, Instead(call_with_hooks, (copied(batch),))))
    for step, told, inputs in runs:
        failure = _failure(pl_module, inputs, step == "training_step", cut)
        before = None if failure is None else _failure(pl_module, inputs, step == "training_step")
        # Hooks may fail here in any case, as those that read what a step logged do, but then in the same way.
        if failure != before and (before is None or told != step):
            traceable = step != traced and (step == "validation_step" or pl_module.automatic_optimization)
            way = f"Use trace={step!r}, which shows" if traceable else "Trace a step that shows"
            raise PruningError(
                f"{where}(trace={traced!r}): {told} runs on the training batch, but not on the pruned model "
                f"({failure}), since it uses channels in ways that {traced} does not show. {way} them, or name their "
                "layers in ignore."
            )


def refuse_steps_without(
    where: str, pl_module: LightningModule, batch: Any, without: AbstractContextManager[Any]
) -> Any:
    """Refuse a module of which a step runs on a training batch now, and would not once parts of it are removed.

    Args:
        where: The callback, for errors.
        pl_module: The module.
        batch: A training batch.
        without: Leaves these parts out.

    Returns:
        What entering ``without`` gives.

    Raises:
        PruningError: With the error that training would end in.
    """
    runs = {step: Instead(call_silently, (step, copied(batch))) for step in _steps(pl_module)}
    before = {step: _failure(pl_module, inputs, step == "training_step") for step, inputs in runs.items()}
    with without as found:
        after = {step: _failure(pl_module, inputs, step == "training_step") for step, inputs in runs.items()}
    for step, failure in after.items():
        if failure is not None and before[step] is None:
            raise PruningError(
                f"{where}: {step} runs on the training batch, but not on the pruned model ({failure}): code outside "
                "of mixtures goes by the number of experts. Let it read the number from what the model returns."
            )
    return found


def _failure(
    pl_module: LightningModule, inputs: ExampleInputs, training: bool = False, cut: Cut | None = None
) -> str | None:
    """Return how a module fails on inputs, if it does; with ``cut``, as if that was made."""
    try:
        with undisturbed(pl_module, inputs), attributes_set(pl_module, cut.attributes if cut else ()):
            exchange_(pl_module, cut.tensors(pl_module) if cut else {})
            with mode_of(pl_module, training, training):
                run(pl_module, inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _ways(pl_module: LightningModule, batch: Any, traced: Traced) -> Iterator[tuple[str, ExampleInputs]]:
    """Yield ways to run a module on a batch, most usual first: its forward on parts of the batch, then its steps."""
    if traced != "forward":
        yield traced, instead_of_forward(traced, batch)
        return
    if overrides(pl_module, "forward"):
        parameters = inspect.signature(pl_module.forward).parameters
        for expression, inputs in (*_whole(parameters, batch, "batch"), *_single(batch, "batch")):
            yield f"forward of {expression}", inputs
    for step in _steps(pl_module):
        if step != "training_step" or pl_module.automatic_optimization:  # others return no loss
            yield step, instead_of_forward(step, batch)


def _steps(pl_module: LightningModule) -> list[Traced]:
    """Return the steps that a module has."""
    steps: tuple[Traced, ...] = ("training_step", "validation_step")
    return [step for step in steps if overrides(pl_module, step)]


def _whole(parameters: _Parameters, batch: Any, expression: str) -> Iterator[tuple[str, ExampleInputs]]:
    """Yield what forward may take: the first part of the batch, parts named as its parameters are, all of it."""
    if isinstance(batch, tuple | list) and batch:
        first = f"{expression}[0]"
        yield from [(first, batch[0])] if isinstance(batch[0], Tensor) else _whole(parameters, batch[0], first)
        yield f"*{expression}", tuple(batch)
    if isinstance(batch, Mapping):
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        named = {str(key): value for key, value in batch.items() if takes_any or key in parameters}
        if named:
            yield f"**{expression}", named
    yield expression, (batch,)
    if _is_object(batch):
        named = {name: getattr(batch, name) for name in parameters if hasattr(batch, name)}
        if named:
            yield f"{', '.join(f'{expression}.{name}' for name in named)}", named


def _single(batch: Any, expression: str) -> Iterator[tuple[str, ExampleInputs]]:
    """Yield single tensors under the names that inputs usually have, of a mapping or an object, or in a first part."""
    if isinstance(batch, tuple | list) and batch:
        yield from _single(batch[0], f"{expression}[0]")
    for name in _INPUTS:
        value = batch.get(name) if isinstance(batch, Mapping) else None
        if _is_object(batch):
            value = getattr(batch, name, None)
        if isinstance(value, Tensor):
            yield f"{expression}[{name!r}]" if isinstance(batch, Mapping) else f"{expression}.{name}", value


def _is_object(batch: Any) -> bool:
    """Return whether a batch keeps its parts in attributes."""
    plain = isinstance(batch, Tensor | Mapping | list | str | int | float) or type(batch) is tuple
    return batch is not None and not plain


def _one_example(inputs: ExampleInputs) -> ExampleInputs | None:
    """Return the first example alone, where all tensors agree on how many there are."""
    sizes = {tensor.shape[0] if tensor.dim() else -1 for tensor in tensors_in(inputs)}
    if len(sizes) != 1 or sizes <= {-1, 0, 1}:
        return None
    # a copy: a slice would keep the whole batch in memory
    one: ExampleInputs = pytree.tree_map_only(Tensor, lambda tensor: tensor[:1].detach().clone(), inputs)
    return one
