"""Prunes single weights by their size while a model trains, gradually, in rounds, or with rewinding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_prune.callbacks._guard import guards
from lightning_prune.callbacks._pruning import Pruning
from lightning_prune.callbacks._refusals import pruning_callbacks, refuse_masks, structured_callbacks
from lightning_prune.callbacks._rewind import draw_anew_, remember, rewind_
from lightning_prune.errors import PruningError
from lightning_prune.masks import Masks, unpacked
from lightning_prune.reports import weight_table
from lightning_prune.schedules import Schedule
from lightning_prune.surgery import Kept, PackedMasks, recipe_of
from lightning_prune.weight_pruning import (
    ToPrune,
    WeightCount,
    check_weight_arguments,
    choose_weights,
    score_weights,
    shuffled,
    weights_to_prune,
)

__all__ = ["IterativeMagnitudePruning"]

_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, optim.ASGD, optim.Rprop,
)  # fmt: skip


@dataclass
class _State:
    """Everything that changes in the life of the callback, beside how far it has come."""

    masks: PackedMasks = field(default_factory=dict)
    early: dict[str, Any] | None = None  # what rounds are rewound to
    to_prune: ToPrune | None = None
    counts: tuple[WeightCount, ...] = ()
    mask_gradients: bool = False


class IterativeMagnitudePruning(Pruning):
    """Set the weights that are smallest in absolute value to zero while the model trains, and keep them there.

    Sparsity is absolute: ``amount`` is what is zero in the end, of all weights there are. Nothing is wrapped or
    renamed: after each step of the optimizer the weights are multiplied by their masks, so that they are exactly zero
    in every forward pass, in validation, in checkpoints and in averages of the weights. At each cut the optimizer
    forgets what it remembered of the weights that go.

    With ``rewind_to`` each cut of the schedule ends a round: the weights that are left, all other parameters and
    buffers, optimizer, learning rates and their schedulers go back to where they were then, so let ``every`` be as long
    as a training. ``Geometric`` takes the same share of what is left in every round.

    Logged every epoch: ``prune/weight_sparsity`` (share of these weights that is zero), ``prune/nonzero`` and
    ``prune/nonzero_kept`` (parameters of the whole model that are not masked, as number and as share); and
    ``prune/sparsity``, which is the first of these unless a callback of the run removes units and speaks of them.

    Args:
        amount: Fraction, in [0, 1), of the weights that shall be zero in the end; or, by pattern of names of modules or
            parameters, of these: ``{"fc1": 0.92, "fc3": 0.74}`` (what no pattern names stays dense). By default 0.5, or
            what ``pattern`` says.
        scope: ``global`` compares weights across layers; ``layer`` takes the same share of every layer.
        schedule: When how much of it leaves; by default everything before the first batch, as when a trained model is
            pruned and fine-tuned.
        parameters: Patterns of modules, whose linear and convolution weights are meant, or of parameters; by default
            all weights of linear and convolutional layers. Biases, norms and embeddings stay.
        ignore: Patterns of modules or parameters that stay dense.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N stay in the end (see
            :func:`~lightning_prune.prune_weights`).
        rewind_to: Optimizer steps after which training stood where each cut takes it back to; 0 is the initialisation.
            By default training goes on with the weights as they are. Checkpoints hold what was there.
        control: What the last round does instead, to compare: ``reinitialize`` draws the weights anew (with
            ``reset_parameters`` of their modules), ``shuffle`` puts the masks at random places of each weight.
        mask_gradients: Whether gradients of masked weights are zeroed before a step, too. ``auto`` does so where it
            makes a difference to the weights that are left: if gradients are clipped, or for optimizers that look at
            more than each weight by itself.

    Raises:
        ValueError: If an argument is out of range, or two contradict.
        TypeError: If an argument is of a wrong kind.

    Example:
        >>> from lightning_prune import Geometric
        >>> rounds = Geometric(start=10, end=40, every=10)  # four rounds after the first ten epochs
        >>> IterativeMagnitudePruning(amount=1 - 0.8**4, schedule=rounds, rewind_to=0).rewind_to
        0

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015 (arXiv:1506.02626);
        Zhu and Gupta, To Prune, or Not to Prune, 2017 (arXiv:1710.01878);
        Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019 (arXiv:1803.03635);
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (arXiv:1912.05671).
    """

    def __init__(
        self,
        amount: float | dict[str, float] | None = None,
        scope: Literal["global", "layer"] = "global",
        schedule: Schedule | None = None,
        parameters: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        pattern: str | None = None,
        rewind_to: int | None = None,
        control: Literal["reinitialize", "shuffle"] | None = None,
        mask_gradients: bool | Literal["auto"] = "auto",
    ) -> None:
        where = type(self).__name__
        check_weight_arguments(where, amount, scope, "magnitude", parameters, ignore, pattern)
        super().__init__(schedule)
        first = next(moment for moment in range(self.schedule.last + 1) if self.schedule.progress(moment) > 0)
        if rewind_to is not None and (isinstance(rewind_to, bool) or not isinstance(rewind_to, int) or rewind_to < 0):
            raise ValueError(f"{where}(rewind_to={rewind_to!r}): it is a number of optimizer steps, from 0.")
        if rewind_to is not None and self.schedule.by == "steps" and first < rewind_to:
            raise ValueError(
                f"{where}(schedule={schedule!r}, rewind_to={rewind_to}): the first cut, at step {first}, comes before "
                "the step that it rewinds to. Rewind to an earlier one."
            )
        if control not in (None, "reinitialize", "shuffle"):
            raise ValueError(f"{where}(control={control!r}): choose 'reinitialize', 'shuffle' or None.")
        if control is not None and rewind_to is None:
            raise ValueError(f"{where}(control={control!r}): controls are for runs that rewind. Give rewind_to, too.")
        if mask_gradients not in (True, False, "auto"):
            raise ValueError(f"{where}(mask_gradients={mask_gradients!r}): choose True, False or 'auto'.")
        self.amount = amount
        self.scope: Literal["global", "layer"] = scope
        self.parameters = parameters if parameters is None else list(parameters)
        self.ignore = list(ignore)
        self.pattern = pattern
        self.rewind_to = rewind_to
        self.control = control
        self.mask_gradients = mask_gradients
        self._first = first
        self._state = _State()
        self._masks: Masks | None = None
