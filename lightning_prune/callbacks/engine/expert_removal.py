"""Removes experts of mixtures in a run: scores, plan and removal; neither logs nor says when."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_prune.callbacks.engine.apply_plan import apply_removal_
from lightning_prune.callbacks.engine.batches import training_batches
from lightning_prune.callbacks.engine.example_inputs import inputs_of, refuse_steps_without
from lightning_prune.callbacks.engine.expert_arguments import ExpertArguments
from lightning_prune.callbacks.engine.processes import over_processes, recalibrate_, replicated_anew
from lightning_prune.callbacks.engine.refusals import refuse_not_finite, refuse_other_part
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.callbacks.engine.whole_removal import WholeRemoval
from lightning_prune.model.batch_norm import batch_norms
from lightning_prune.model.calls import run as run_model
from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import part_of
from lightning_prune.pruning.expert_scores import experts_read, score_experts
from lightning_prune.pruning.experts import (
    ExpertBudget,
    Mixtures,
    in_words,
    prunable_mixtures,
    refuse_none,
    verified_cuts,
)
from lightning_prune.reports import Goal, LayerCost, layer_costs
from lightning_prune.structure.tensor_names import lies_in
from lightning_prune.surgery import recipe_of
from lightning_prune.surgery.remove_experts import ExpertCut, remove_experts_, take_out_experts_, temporarily_without

__all__ = ["ExpertRemoval"]


@dataclass
class DenseExperts:
    """The model when pruning began, which amounts are relative to.

    Attributes:
        experts: Path of each mixture -> its number of experts.
        params: Parameters.
        flops: Multiply-adds of a call on the example inputs.
        layers: What each module with weights cost, and each mixture as a whole, for the report.
    """

    experts: dict[str, int]
    params: int
    flops: int
    layers: dict[str, LayerCost]

    def __post_init__(self) -> None:
        """Turn lists, as a checkpoint holds them, into costs."""
        self.layers = {path: LayerCost(*cost) for path, cost in self.layers.items()}


@dataclass
class ExpertState:
    """Everything that changes in the life of a callback that removes experts.

    Attributes:
        dense: The dense model, once it was looked at.
        left: Path of each mixture -> how many experts it has now.
        share: Share of all experts that is removed in the end.
        refused: Mixtures whose removals could not be verified, and why.
        pinned: Mixtures that are not pruned, and why, as last found.
        config: Why a config of Hugging Face cannot express the pruned model; empty if it can.
    """

    dense: DenseExperts | None = None
    left: dict[str, int] = field(default_factory=dict)
    share: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    config: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Return the state to save."""
        plain = asdict(self)
        if self.dense is not None:
            plain["dense"]["layers"] = {path: list(cost) for path, cost in self.dense.layers.items()}
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ExpertState:
        """Return a saved state."""
        own = {entry.name: copy.copy(plain[entry.name]) for entry in fields(cls)}
        dense = own.pop("dense")
        return cls(None if dense is None else DenseExperts(**dense), **own)


class ExpertRemoval(WholeRemoval):
    """The strategy of the callback that removes experts.

    Args:
        arguments: What the user asked for.
    """

    arguments: ExpertArguments
    kind = "experts"
    state_class = ExpertState
    state: ExpertState
    refused_split = (
        "mixtures are tried on copies with random weights, which no process has under ModelParallelStrategy. Prune "
        "with strategy='ddp', or by prune_experts before the model is sharded."
    )
    _rehearsal: tuple[ExpertCut, ...] = ()  # all that will be removed, for the first batch

    @property
    def dense(self) -> DenseExperts:
        """The dense model."""
        assert self.state.dense is not None  # set before anything is planned
        return self.state.dense

    @property
    def before(self) -> tuple[int, int]:
        """Parameters and multiply-adds of the dense model."""
        return self.dense.params, self.dense.flops

    def kept(self) -> dict[str, float]:
        """Return how many experts are left of all mixtures, and the share that was removed."""
        left = sum(self.state.left.values())
        return {"prune/experts": float(left), "prune/sparsity": self._share_gone(left)}

    def costs(self, pl_module: LightningModule) -> dict[str, LayerCost]:
        """Return what modules with weights cost, and mixtures as a whole, whose width is the number of experts."""
        flops, modules, found = self.flops(pl_module), dict(pl_module.named_modules()), {}
        for path, cost in layer_costs(pl_module, flops).items():
            home = next((home for home in self.state.left if lies_in(path, home)), None)
            if home is None:
                found[path] = cost
            elif home not in found:
                params = sum(parameter.numel() for parameter in modules[home].parameters())
                found[home] = LayerCost(self.state.left[home], params, flops.by_module.get(home, 0))
        return found

    def reads_batches(self, pl_module: LightningModule) -> bool:
        """Return whether experts are scored, or BatchNorm is averaged, on training batches."""
        reads = experts_read(self.arguments.criterion)
        return reads or bool(self.arguments.recalibrate and batch_norms(pl_module))

    def prepare(self, run: Run, batch: Any | None) -> bool:
        """Find mixtures on known inputs, or on the first batch that holds any, and verify the whole amount."""
        if not self.look(run, batch):
            return False
        if self.state.dense is not None and not run.own.clock.unfinished:
            return True
        refuse_other_part(run.where, *run.own.changes.get("module", (None, None)))
        begins, mixtures = self.state.dense is None, self._mixtures(run.module)
        found = {path: mixture.experts for path, mixture in mixtures.likeliest.items()}
        self.state.left |= found
        if begins:
            refuse_none(run.module, mixtures)
            part, flops = self.part(run.module), self.flops(run.module)
            costs = self.costs(run.module)
            self.state.dense = DenseExperts(dict(found), part.params(run.module), part.counted(flops), costs)
        for path, experts in found.items():  # a mixture that was ignored until now is whole
            self.dense.experts.setdefault(path, experts)
        left = self._left(run, mixtures, 1.0)
        if begins or run.own.asks_for_other_amounts:
            self.state.share = self._share_gone(sum((self.state.left | left).values()))
        ranks = {path: torch.arange(experts) for path, experts in found.items()}
        cuts, refused = self._verified(run, mixtures, left, ranks)
        if begins and not cuts:
            told = in_words(refused | mixtures.others)
            raise PruningError(f"No experts of {type(run.module).__name__} can be removed. {told}")
        self._refuse_some(run, refused)
        self._rehearsal = tuple(cut for cut in cuts if len(cut.kept) < cut.mixture.experts)
        return True

    def rehearse(self, run: Run, batch: Any) -> None:
        """Refuse a model whose rest, or whose steps on a training batch, would not run once all is pruned."""
        cuts, self._rehearsal = list(self._rehearsal), ()
        if not cuts:
            return
        # Tensors are exchanged for a while, and with them goes what averages gradients of processes.
        with replicated_anew(run.where, run.trainer, run.module):
            slim = temporarily_without(run.module, self.inputs, cuts)
            follow = refuse_steps_without(run.where, run.module, batch, slim)
        # From now on checkpoints and guards save these numbers, so that they come back with the dense model.
        recipe_of(run.module).note((change.module, change.name) for change in follow)

    def prune_to(self, run: Run, progress: float) -> None:
        """Remove experts up to the share that the schedule asks for at ``progress``."""
        self._rehearsal = ()  # of the model before this step
        refuse_not_finite(run.where, run.module, dict(run.module.named_parameters()))
        mixtures = self._mixtures(run.module)
        left = self._left(run, mixtures, progress)
        left = {path: kept for path, kept in left.items() if kept < mixtures.found[path][0].experts}
        if not left:
            return
        scores = self._scores(run, {path: mixtures.likeliest[path] for path in left})
        cuts, refused = self._verified(run, mixtures, left, scores)
        self._refuse_some(run, refused)
        if cuts:
            self._apply(run, cuts)

    def goal(self, run: Run) -> Goal:
        """Return what was asked and what is reached now."""
        return Goal(run.where, "experts", self.state.share, self._share_gone(sum(self.state.left.values())))

    def after_training(self, run: Run) -> None:
        """Warn if the config of a Hugging Face model cannot say how many experts are left."""
        if self.state.config:
            rank_zero_warn(f"{run.where}: {self.state.config}")

    def rollback_state(self) -> dict[str, Any]:
        """Return how many experts each mixture has."""
        return {"left": dict(self.state.left), "config": self.state.config}

    def rollback(self, run: Run, state: dict[str, Any]) -> None:
        """Follow a model that is as it was before the last pruning step."""
        self.state = ExpertState.from_plain({**self.state.to_plain(), **state})
        self._flops = None

    def _mixtures(self, pl_module: LightningModule) -> Mixtures:
        asked = self.arguments
        mixtures = prunable_mixtures(
            pl_module, self.inputs, part_of(pl_module, asked.module), asked.ignore, self._alone
        )
        self.state.pinned = {**mixtures.others, **self.state.refused}
        return mixtures

    def _left(self, run: Run, mixtures: Mixtures, progress: float) -> dict[str, int]:
        """Return how many experts each mixture keeps at a share of the pruning steps, but for those refused."""
        budget, left = ExpertBudget(run.where, self.arguments.amount, self.arguments.min_experts), {}
        for path, mixture in mixtures.likeliest.items():
            dense = self.dense.experts.get(path, mixture.experts)
            share = run.own.schedule.sparsity(progress, budget.fraction(mixture, dense))
            if path not in self.state.refused:
                left[path] = budget.kept(mixture, dense, share)
        return left

    def _scores(self, run: Run, mixtures: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return scores from training batches of all processes, the same on each."""
        trainer, module = run.trainer, run.module
        criterion, found = self.arguments.criterion, dict[str, Tensor]()
        if experts_read(criterion):
            with training_batches(trainer, module, self.arguments.batches) as batches:
                inputs = inputs_of(module, batches, self.traces)
                summed = partial(over_processes, trainer, module, "sum")
                found = score_experts(module, mixtures.values(), criterion, inputs, run_model, summed)
        else:
            with generators_restored([]):
                torch.manual_seed(torch.initial_seed() + trainer.global_step)  # the same when a run is resumed
                found = score_experts(module, mixtures.values(), criterion, ())
        return trainer.strategy.broadcast(found)

    def _verified(
        self, run: Run, mixtures: Mixtures, left: Mapping[str, int], scores: Mapping[str, Tensor]
    ) -> tuple[list[ExpertCut], dict[str, str]]:
        """Return what the first process verified: copies with random weights may round otherwise elsewhere."""
        return run.trainer.strategy.broadcast(verified_cuts(run.module, mixtures, left, scores))

    def _apply(self, run: Run, cuts: list[ExpertCut]) -> None:
        """Remove experts; where the rest of the model computes something else without them, keep them."""
        failures: list[str] = []

        def remove(module: LightningModule) -> None:
            try:
                _, self.state.config = remove_experts_(module, self.inputs, cuts, run.trainer.optimizers)
            except PruningError as error:  # the model is as it was
                failures.append(str(error))

        def remove_of_copy(copy: nn.Module) -> None:
            if not failures:
                take_out_experts_(copy, cuts)

        apply_removal_(run, remove, remove_of_copy)
        if failures:
            self._refuse_some(run, {cut.mixture.path: failures[0] for cut in cuts})
            return
        self.state.left |= {cut.mixture.path: len(cut.kept) for cut in cuts}
        self._flops = None
        recalibrate_(run.trainer, run.module, self.arguments.recalibrate, self.traces)

    def _refuse_some(self, run: Run, refused: dict[str, str]) -> None:
        """Keep mixtures whole, and say why."""
        if refused:
            self.state.refused |= refused
            self.state.pinned |= refused
            rank_zero_warn(f"{run.where}: {in_words(refused)}")

    def _share_gone(self, left: int) -> float:
        return 1 - left / max(sum(self.dense.experts.values()), 1)
