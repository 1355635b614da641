"""Removes whole experts of mixtures while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.expert_arguments import ExpertArguments
from lightning_prune.callbacks.engine.expert_removal import ExpertRemoval
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.pruning.arguments import Parts

__all__ = ["ExpertPruning"]


class ExpertPruning(PruningCallback):
    """Remove whole experts from the mixtures of experts of a model while it trains.

    Experts leave the model itself, before the first batch of an epoch, with their entries of the routers; their
    parameters leave the optimizers. Each removal is verified before it is made, and the whole amount is tried before
    the first step. Logged every epoch: ``prune/experts`` (experts that are left, of all mixtures), ``prune/sparsity``
    (share of them that was removed), ``prune/params``, ``prune/flops``, ``prune/params_kept`` and ``prune/flops_kept``.
    See :func:`~lightning_prune.pruning.experts.prune_experts` for what is a mixture.

    Args:
        amount: Fraction, in [0, 1), of the experts of every mixture that is removed; or a whole number of them. It is
            relative to the dense model.
        criterion: How experts are scored; higher is kept longer. ``reap``: mean, over the tokens that an expert gets,
            of its gate times the norm of its output. ``frequency``: number of tokens that it gets. ``magnitude``: l2
            norm of its weights. ``random``.
        schedule: When how much of ``amount`` is pruned. By default everything before the first batch.
        batches: Number of training batches of each process that are read at a pruning step. Experts are scored on them.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of module paths, or modules, whose mixtures are not pruned, nor those inside of them.
        min_experts: Experts that are kept of every mixture at least.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs. By default the module's
            ``example_input_array``, else one example of the first training batch.
        recalibrate: Number of training batches over which BatchNorm's statistics are averaged anew after each pruning
            step; 0 averages nothing.
        trace: What of the module is traced, counted and verified: its ``forward``, or, where it trains otherwise, what
            ``training_step`` or ``validation_step`` runs on the first training batch, in eval mode.
        report: Whether tables are printed and a report is written where each logger keeps its files, when the run ends.
            One callback with ``False`` switches both off for the whole run.

    Raises:
        ValueError: If an argument is out of range or unknown.
        TypeError: If an argument is of a wrong kind.

    Examples:
        >>> from lightning_prune import Linear
        >>> ExpertPruning(amount=0.5, schedule=Linear(start=1, end=4)).criterion
        'reap'

    References:
        Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (arXiv:2510.13999).
    """

    def __init__(
        self,
        amount: int | float = 0.25,
        *,
        criterion: Literal["reap", "frequency", "magnitude", "random"] = "reap",
        schedule: Schedule | None = None,
        batches: int = 8,
        module: Parts = None,
        ignore: Sequence[str] = (),
        min_experts: int = 1,
        example_inputs: Any = None,
        recalibrate: int = 0,
        trace: Literal["forward", "training_step", "validation_step"] = "forward",
        report: bool = True,
    ) -> None:
        arguments = ExpertArguments(
            amount, criterion, batches, module, ignore, min_experts, example_inputs, recalibrate, trace, report
        )
        self._removal = ExpertRemoval(arguments)
        super().__init__(OneShot() if schedule is None else schedule, self._removal)

    @property
    def experts(self) -> dict[str, int]:
        """How many experts each mixture has now, by its path."""
        return dict(self._removal.state.left)
