"""Prunes single weights, by default by their size, while a model trains: gradually, in rounds, or with rewinding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_prune.algorithms.schedules import OneShot, Schedule
from lightning_prune.callbacks.engine.named_criterion import found_criterion
from lightning_prune.callbacks.engine.pruning_callback import PruningCallback
from lightning_prune.callbacks.engine.smallest_weights import Control, SmallestWeights
from lightning_prune.callbacks.engine.weight_arguments import WeightArguments
from lightning_prune.callbacks.engine.weight_masking import WeightMasking
from lightning_prune.pruning.arguments import Parts
from lightning_prune.pruning.weights import WEIGHT_CRITERIA, WeightCriterion


class IterativeMagnitudePruning(PruningCallback):
    """Set the weights that are smallest in absolute value to zero while the model trains, and keep them there.

    Other criteria than the absolute value can be named or passed.

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
        amount: Fraction, in [0, 1), of the weights that are set to zero, relative to the dense model; or a whole number
            of them, of each layer or, with ``scope="global"``, of all; or these by pattern of paths of modules or
            parameters, or by module, of their weights. What no pattern names stays dense. By default 0.5, or what
            ``pattern`` says.
        criterion: Name of a criterion, or a function from a weight to one score for each of its entries; higher is kept
            longer. ``magnitude``, ``random`` (drawn by the seed of the run), or the import path of a function.
        scope: ``layer`` prunes the same fraction of every layer, ``global`` compares scores across layers; fractions by
            pattern are of each layer under both.
        schedule: When how much of ``amount`` is pruned. By default everything before the first batch, as when a trained
            model is pruned and fine-tuned.
        module: Path of a module, or the module, or a list of them: this part of the model is pruned and counted alone.
        ignore: Patterns of paths of modules or parameters, or modules, that are not pruned.
        parameters: Patterns of paths of modules or parameters, modules, or pairs of a module and a parameter's name,
            that are pruned; by default the weights of all linear and convolutional layers.
        pattern: ``"N:M"``: of every M neighbours along the input dimension N are kept. See
            :func:`~lightning_prune.prune_weights`.
        mask_gradients: Whether gradients of masked weights are zeroed before a step, too.
        rewind_to: Optimizer steps after which training stood where each cut takes it back to; 0 is the initialisation.
            By default training goes on with the weights as they are. Checkpoints hold what was there.
        control: What the last round does instead, to compare: ``reinitialize`` draws the weights anew (with
            ``reset_parameters`` of their modules), ``shuffle`` puts the masks at random places of each weight.
        report: Whether tables are printed and a report is written where each logger keeps its files, when the run ends.
            One callback with ``False`` switches both off for the whole run.

    Raises:
        ValueError: If an argument is out of range, or two contradict.
        TypeError: If an argument is of a wrong kind.

    Examples:
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
        amount: int | float | dict[str, int | float] | None = None,
        *,
        criterion: WeightCriterion = "magnitude",
        scope: Literal["layer", "global"] = "layer",
        schedule: Schedule | None = None,
        module: Parts = None,
        ignore: Sequence[str] = (),
        parameters: Sequence[str] | None = None,
        pattern: str | None = None,
        mask_gradients: bool | Literal["auto"] = "auto",
        report: bool = True,
        rewind_to: int | None = None,
        control: Literal["reinitialize", "shuffle"] | None = None,
    ) -> None:
        arguments = WeightArguments(amount, scope, module, ignore, parameters, pattern, mask_gradients, report)
        found = found_criterion(type(self).__name__, criterion, WEIGHT_CRITERIA)
        choice = SmallestWeights(found, scope, pattern, rewind_to, control)
        schedule = OneShot() if schedule is None else schedule
        super().__init__(schedule, WeightMasking(arguments, choice))
        choice.check(type(self).__name__, schedule)
        self.criterion = criterion
        self.rewind_to = rewind_to
        self.control: Control | None = control
