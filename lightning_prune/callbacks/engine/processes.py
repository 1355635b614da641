"""Finds out, for all processes of a run alike, what one of them measures or each sees a part of."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.callbacks.engine.batches import training_batches
from lightning_prune.callbacks.engine.example_inputs import inputs_of
from lightning_prune.callbacks.engine.step import Traced
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.latency import CutDoesNotRunError, Shapes, latency_kept
from lightning_prune.model.batch_norm import batch_norms, recalibrate_batch_norm
from lightning_prune.model.calls import ExampleInputs, run
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import Keep, Structure

__all__ = [
    "calibration_of", "latency_of_first", "over_processes", "recalibrate_", "refuse_apart", "refuse_early_end",
    "refuse_uneven", "replicated_anew",
]  # fmt: skip

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**22  # words whose sum is taken at a time, so that no second model lies in memory


_EVEN_OUT = (
    "They would come to a cut at different times, and each wait for steps that the others never take. Give all of them "
    "as many: let Lightning distribute the sampler, or set limit_train_batches to the smallest number."
)


def over_processes(trainer: Trainer, pl_module: LightningModule, how: Literal["mean", "sum"], own: Tensor) -> Tensor:
    """Return the mean or sum of a tensor of the CPU over processes; one process alone sends nothing to its device.

    Scores are of double precision, which not every device has.
    """
    if trainer.world_size == 1:
        return own
    found: Any = trainer.strategy.reduce(own.to(pl_module.device), reduce_op=how)
    return found.cpu()


def latency_of_first(
    trainer: Trainer,
    pl_module: LightningModule,
    example_inputs: ExampleInputs,
    whole: Shapes | None,
    structure: Structure,
    keep: Keep,
) -> float:
    """Measure on the first process what share of the latency a choice leaves, and tell the others.

    Raises:
        CutDoesNotRunError: On all processes, if the slim model fails.
    """
    found: float | None = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        assert whole is not None  # noted at the start of a run whose target is latency
        try:
            with trainer.precision_plugin.forward_context():
                found = latency_kept(pl_module, example_inputs, structure, keep, whole)
        except CutDoesNotRunError as error:
            failure = error.__cause__  # type: ignore[assignment]
    found = trainer.strategy.broadcast(found)
    if found is None:
        raise CutDoesNotRunError(keep) from failure
    return found


@contextmanager
def calibration_of(
    trainer: Trainer, pl_module: LightningModule, count: int, traced: Traced = "forward"
) -> Iterator[Calibration]:
    """Yield the first training batches of each process, not in autocast, which hides parameters; sums are over all."""
    with training_batches(trainer, pl_module, count) as batches:
        inputs = list(inputs_of(pl_module, batches, traced))
        yield Calibration(inputs, run, over_processes=partial(trainer.strategy.reduce, reduce_op="sum"))


def recalibrate_(trainer: Trainer, pl_module: LightningModule, count: int, traced: Traced = "forward") -> None:
    """Average BatchNorm's statistics anew, over the first training batches of each process, and over processes."""
    norms = batch_norms(pl_module)
    if not count or not norms:
        return
    with training_batches(trainer, pl_module, count) as batches, trainer.precision_plugin.forward_context():
        recalibrate_batch_norm(pl_module, inputs_of(pl_module, batches, traced), run)
    for norm in norms.values():
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


def refuse_apart(where: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to go on where processes that train one model hold others, by one small message a cut.

    Raises:
        PruningError: On all processes, naming the first parameter that differs.
    """
    strategy = trainer.strategy
    alone = {*getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())}  # of each process, as DDP was told
    if getattr(strategy, "_model_averaging_period", None) is not None:  # weights part on purpose for a while
        return
    own = {name: parameter for name, parameter in pl_module.named_parameters() if name not in alone}
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    sums = torch.stack([_bits_summed(parameter) for parameter in own.values()])
    ours = torch.stack([torch.tensor(zlib.crc32(repr(shapes).encode())).to(sums), _bits_summed(sums)])
    found = strategy.all_gather(ours.to(strategy.root_device)).view(-1, 2)  # type: ignore[attr-defined]
    apart = [rank for rank, theirs in enumerate(found.tolist()) if theirs != found[0].tolist()]
    if not apart:
        return
    checksums = {name: (shapes[name], int(number)) for name, number in zip(shapes, sums, strict=True)}
    first, other = strategy.broadcast(checksums), strategy.broadcast(checksums, apart[0])
    name = next(name for name in [*first, *other] if first.get(name) != other.get(name))
    here, there = first.get(name, ("absent",))[0], other.get(name, ("absent",))[0]
    raise PruningError(
        f"{where}: after a cut the processes hold different models. The first to differ is {name}: {here} on process "
        f"0, {there} on process {apart[0]}{'' if here != there else ', with other values'}. Something differs between "
        "processes before that: a learning rate that follows a metric logged without sync_dist=True, code that asks "
        "for the rank, or steps outside of DDP's backward pass."
    )


@contextmanager
def replicated_anew(where: str, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Change the plain module in the body; what averages gradients of processes is made anew for the new shapes."""
    strategy = trainer.strategy
    averaged = isinstance(strategy.model, DistributedDataParallel)
    if averaged:
        strategy.model = pl_module
    yield
    if averaged:
        refuse_apart(where, trainer, pl_module)  # wrapping anew sends the first process's weights to all
        strategy.configure_ddp()  # type: ignore[attr-defined]


def refuse_uneven(where: str, trainer: Trainer) -> None:
    """Refuse processes whose loaders say that epochs have different numbers of batches.

    Raises:
        PruningError: On all processes, with the numbers.
    """
    if trainer.world_size > 1:
        count, device = float(trainer.num_training_batches), trainer.strategy.root_device
        own = torch.tensor(count, dtype=torch.float32, device=device)
        found = [f"{count:.0f}" for count in trainer.strategy.all_gather(own).flatten().tolist()]  # type: ignore[attr-defined]
        if len(set(found)) > 1:
            raise PruningError(f"{where}: processes have {', '.join(found)} batches an epoch. {_EVEN_OUT}")


def refuse_early_end(where: str, trainer: Trainer) -> None:
    """Refuse to go on where one process has come to the end of its data and another has not.

    That is asked after each step where loaders do not say beforehand how many batches there are.

    Raises:
        PruningError: On all processes.
    """
    if trainer.world_size > 1 and not math.isfinite(trainer.num_training_batches):
        own = torch.tensor(float(trainer.is_last_batch), dtype=torch.float32, device=trainer.strategy.root_device)
        ended = float(trainer.strategy.reduce(own, reduce_op="mean"))
        if 0 < ended < 1:
            count = trainer.fit_loop.epoch_loop.batch_idx + 1
            raise PruningError(
                f"{where}: after {count} batches, {ended:.0%} of the processes are at the end of epoch "
                f"{trainer.current_epoch}. {_EVEN_OUT}"
            )


def _bits_summed(tensor: Tensor) -> Tensor:
    """Return a sum over the bits of a tensor, each word weighed by its place."""
    tensor = tensor.detach()
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = plain.reshape(-1).contiguous().view(_WORDS[plain.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in words.split(_AT_ONCE):
        places = torch.arange(1, len(part) + 1, device=tensor.device)
        total = 31 * total + (part.long() * places).sum()
    return total
