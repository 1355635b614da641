"""Holds and checks the arguments that all callbacks share that mask weights; prunes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn, optim
from torch.optim import Optimizer

from lightning_prune.callbacks.engine.packages import overrides
from lightning_prune.pruning.arguments import Parts, as_list, check_module, listed, plain, told_apart
from lightning_prune.pruning.weights import WeightScope, check_weight_arguments

__all__ = ["MaskGradients", "WeightArguments"]

_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, optim.ASGD, optim.Rprop,
)  # fmt: skip

MaskGradients = bool | Literal["auto"]
"""Whether gradients of masked weights are zeroed; ``auto`` where it changes steps of the others."""


@dataclass(frozen=True, eq=False)
class WeightArguments:
    """Which weights, and how many; :class:`~lightning_prune.IterativeMagnitudePruning` documents each."""

    amount: int | float | dict[str, int | float] | None
    scope: WeightScope
    module: Parts
    ignore: Sequence[str]
    parameters: Sequence[str] | None
    pattern: str | None
    mask_gradients: MaskGradients
    report: bool

    def __post_init__(self) -> None:
        """Hold sequences as lists, as YAML gives them."""
        object.__setattr__(self, "ignore", as_list(self.ignore))
        if self.parameters is not None:
            object.__setattr__(self, "parameters", as_list(self.parameters))

    def check(self, where: str) -> None:
        """Refuse arguments that no model could make sense of.

        Raises:
            ValueError: If an argument is out of range, or two contradict.
            TypeError: If an argument is of a wrong kind.
        """
        check_module(where, self.module)
        check_weight_arguments(where, self.amount, self.scope, "magnitude", self.parameters, self.ignore, self.pattern)
        if self.mask_gradients not in (True, False, "auto"):
            raise ValueError(f"{where}(mask_gradients={self.mask_gradients!r}): choose True, False or 'auto'.")

    @property
    def named(self) -> list[Any]:
        """What the user named to be pruned."""
        return [
            *(self.amount if isinstance(self.amount, Mapping) else ()),
            *(self.parameters or ()),
            *listed(self.module),
        ]

    def parts(self, model: nn.Module | None) -> dict[str, Any]:
        """Return the arguments that say which weights are pruned, modules by their path once the model is known."""
        return {
            "amount": sorted(plain(self.amount, model)) if isinstance(self.amount, Mapping) else [],
            "parameters": plain(self.parameters, model),
            "ignore": plain(self.ignore, model),
            **told_apart(self.module, model),
        }

    def masks_gradients(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return whether to mask gradients: by default where they would change steps of the weights that are kept."""
        if self.mask_gradients != "auto":
            return bool(self.mask_gradients)
        clips = bool(trainer.gradient_clip_val) or overrides(pl_module, "configure_gradient_clipping")
        return clips or any(type(optimizer) not in _ELEMENTWISE for optimizer in trainer.optimizers)
