"""Knows when the gradients of masked weights change steps of the others, and zeroes them then; sets no mask."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_prune.callbacks.engine.packages import overrides
from lightning_prune.callbacks.engine.weight_arguments import MaskGradients
from lightning_prune.surgery.masks import Masks

__all__ = ["GradientMasks", "masks_gradients"]

_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad,
    optim.Adadelta, optim.ASGD, optim.Rprop,
)  # fmt: skip


def masks_gradients(asked: MaskGradients, trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether to mask gradients: by default where they would change steps of the weights that are kept."""
    if asked != "auto":
        return bool(asked)
    clips = bool(trainer.gradient_clip_val) or overrides(pl_module, "configure_gradient_clipping")
    return clips or any(type(optimizer) not in _ELEMENTWISE for optimizer in trainer.optimizers)


class GradientMasks:
    """Zeroes the gradients of masked weights before they are clipped."""

    def __init__(self, masks: Masks) -> None:
        self._masks = masks

    def before_backward(self, loss: Tensor) -> None:
        """Look at nothing."""

    def after_backward(self, trainer: Trainer) -> None:
        """Look at nothing: gradients may be accumulated further."""

    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of what this optimizer trains."""
        self._masks.mask_gradients_(optimizer)
