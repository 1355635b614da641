"""What functions that prune units return: widths, costs, what was verified, and asked against reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_prune.measure.flops import BY_TRACE
from lightning_prune.structure import Pinned
from lightning_prune.surgery import AttributeChange, Constant, Kept

__all__ = ["GroupWidth", "LayerReport", "RemovedLayer", "Repair", "Report", "WeightReport"]


class GroupWidth(NamedTuple):
    """The units of a channel group, or the weights of a parameter, before and after pruning."""

    name: str
    before: int
    after: int


class Repair(NamedTuple):
    """A weight that was refitted: the share of its outputs' energy lost without the refit, and with it."""

    name: str
    before: float
    after: float


class RemovedLayer(NamedTuple):
    """A layer that was removed: its path, its score when it was chosen, and what left with it."""

    path: str
    score: float
    params: int
    flops: int


class TriedSplit(NamedTuple):
    """A number of layers that was tried with filters for the rest of the budget.

    Shares of the target that layers and filters removed, then the mean loss (or how far outputs moved), and why it was
    refused; else empty.
    """

    layers: int
    by_layers: float
    by_filters: float
    lost: float
    refused: str


@dataclass(frozen=True, eq=False)
class Report:
    """What pruning units did.

    Attributes:
        params_before: Parameters of the model, or of the part that ``module`` names, before.
        params_after: Parameters after.
        flops_before: Multiply-adds of one forward pass on the example inputs before.
        flops_after: Multiply-adds after.
        groups: Name and widths of every channel group.
        kept: For every parameter or buffer that changed, dimension -> indices kept.
        attributes: Attributes of modules that changed.
        pinned: What is not prunable, and why.
        proved: Whether all of the cut was verified: in each mode that the model's code looks at, every operator that
            carries pruned channels. What turns out wrong is not pruned, but listed under ``pinned``.
        proof: What was verified, and what was not, in words.
        branching: Modules whose code goes by numbers of its input: only the path that the example inputs took was seen.
        latency_kept: Share of the latency that is left, as measured, where that was the target.
        measured: What the latency was measured on.
        asked: Share of the target that was to be removed; for amounts by pattern, of the filters of all layers named.
        reached: The share that was removed. Where that is less than asked, a warning has said why.
        counted: What counted the multiply-adds, in words.
        constants: Numbers that code works out from widths, such as 1/sqrt(head width), and that changed with them.
        scaled: Parameters that were scaled so that such numbers change nothing.
        repairs: With ``repair``: weights that were refitted, in the order in which they run.
        skipped: With ``repair``: by name, why a weight that sums over pruned units was not refitted.
        config: Why the config of a Hugging Face model cannot express the pruned one; empty if it can.
        removed: With ``layers``: the layers that were removed, in the order in which they were chosen.
        tried: With ``layers``: every number of layers that was tried, with what it lost.
    """

    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    groups: tuple[GroupWidth, ...]
    kept: Kept
    attributes: tuple[AttributeChange, ...]
    pinned: tuple[Pinned, ...]
    proved: bool
    proof: str
    branching: tuple[str, ...] = ()
    latency_kept: float | None = None
    measured: str = ""
    asked: float = 0.0
    reached: float = 0.0
    counted: str = BY_TRACE
    constants: tuple[Constant, ...] = ()
    scaled: tuple[str, ...] = ()
    repairs: tuple[Repair, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    removed: tuple[RemovedLayer, ...] = ()
    tried: tuple[TriedSplit, ...] = ()


@dataclass(frozen=True, eq=False)
class WeightReport:
    """What pruning weights did; its fields mean what those of :class:`Report` do.

    Attributes:
        params_before: Parameters of the model before, without those that masks held at zero.
        params_after: The same after.
        groups: Name of every parameter that could be pruned, the number of its weights and of those that are kept.
        kept: Name of each of them -> which weights are kept, as bool of its shape.
        pinned: What is not prunable, and why.
        asked: Share of all these weights that was to be zero; for amounts by pattern, of those that patterns name.
        reached: The share that is zero.
        details: What the method knows besides: of :func:`~lightning_prune.prune_obs` a fit for each layer.
    """

    params_before: int
    params_after: int
    groups: tuple[GroupWidth, ...]
    kept: dict[str, Tensor]
    pinned: tuple[Pinned, ...]
    asked: float
    reached: float
    details: Any = None


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What pruning layers did; its fields mean what those of :class:`Report` do.

    Attributes:
        params_before: Parameters of the model, or of the part that ``module`` names, before.
        params_after: Parameters after.
        flops_before: Multiply-adds of one forward pass on the example inputs before.
        flops_after: Multiply-adds after.
        removed: The layers that were removed, in the order in which they were chosen.
        kept: Paths of the layers that could be removed and were kept.
        pinned: Path of a module that holds weights -> why it cannot be removed.
        proved: Whether the removal was verified: every operator of the model without these layers, against the whole
            model in which they return what they are given, in eval mode.
        proof: What was verified, and what was not, in words.
        latency_kept: Share of the latency that is left, as measured, where that was the target.
        measured: What the latency was measured on.
        asked: Share of the target that was to be removed.
        reached: The share that was removed. Where that is less than asked, a warning has said why.
        counted: What counted the multiply-adds, in words.
        repairs: With ``repair``: weights that were refitted, in the order in which they run.
        skipped: With ``repair``: by name, why a weight behind a removed layer was not refitted.
        config: Why the config of a Hugging Face model cannot express the removal; empty if it does.
    """

    params_before: int
    params_after: int
    flops_before: int
    flops_after: int
    removed: tuple[RemovedLayer, ...]
    kept: tuple[str, ...]
    pinned: Mapping[str, str]
    proved: bool
    proof: str
    latency_kept: float | None = None
    measured: str = ""
    asked: float = 0.0
    reached: float = 0.0
    counted: str = BY_TRACE
    repairs: tuple[Repair, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
