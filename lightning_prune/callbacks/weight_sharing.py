"""Has weights share few values while a model trains, and trains these values on."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.engine.packages import AnyCallback
from lightning_prune.callbacks.engine.pruning_callback import pruned_so_far, pruning_callbacks, pruning_finished
from lightning_prune.callbacks.engine.settings import compared_arguments, warn_of_changes
from lightning_prune.callbacks.engine.sharding import is_model_parallel
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import Parameters, Parts, check_module
from lightning_prune.pruning.sharing import SharingReport, check_sharing, share_weights
from lightning_prune.surgery.shared_values import SharedValues, packed_codes


class WeightSharing(AnyCallback):
    """Set the weights of each layer to few values, and train these values on (Deep Compression).

    From the first epoch that begins, from ``epoch`` on, when all pruning is done, each layer has at most ``2 ** bits``
    values, and zero where it is pruned. Each is moved by the sum of the gradients of the weights that share it, which
    is many times the gradient of one weight: lower the learning rate for plain SGD. Optimizers start anew with shared
    weights. Put it behind the pruning callbacks. Checkpoints hold ordinary weights; ``lightning-prune export`` and
    :func:`~lightning_prune.save_sparse` store them as codes.

    Args:
        bits: Bits of a code, from 1 to 8; or bits by pattern of paths of modules or parameters. What no pattern names
            is left as it is.
        epoch: First epoch before which weights may share values.
        module: Path of a module, or the module, or a list of them: only weights in this part of the model are shared.
        ignore: Patterns of paths of modules or parameters, or modules, whose weights are left as they are.
        parameters: Patterns of those that share values; by default the weights of all linear and convolutional layers.

    Attributes:
        report: What shares values, once it does in this run.

    Raises:
        ValueError: If an argument is out of range, or a pattern names nothing.
        TypeError: If an argument is of a wrong kind.
        PruningError: If weights are split over processes, or there is none to share.

    Examples:
        >>> WeightSharing(bits=5, epoch=8).bits
        5

    References:
        Han, Mao, Dally, Deep Compression, ICLR 2016, sec. 3 (arXiv:1510.00149).
    """

    def __init__(
        self,
        bits: int | dict[str, int] = 5,
        *,
        epoch: int = 0,
        module: Parts = None,
        ignore: Parameters = (),
        parameters: Parameters | None = None,
    ) -> None:
        where = type(self).__name__
        check_sharing(where, bits, parameters, ignore)
        check_module(where, module)
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"{where}(epoch={epoch!r}): it is the number of an epoch, from 0.")
        self.bits = bits
        self.epoch = epoch
        self.module = module
        self.ignore = ignore
        self.parameters = parameters
        self.report: SharingReport | None = None
        self._trained: weakref.ref[LightningModule] | None = None  # which the codes are of
        self._codes: dict[str, Tensor] | None = None
        self._pruned: list[float] = []  # how far each callback had pruned when values were chosen
        self._shared: SharedValues | None = None  # while a model trains

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights that are split over processes; start anew for another module."""
        if stage == "fit" and is_model_parallel(trainer):
            raise PruningError(
                f"{type(self).__name__}: ModelParallelStrategy splits weights over processes, so no process sees a "
                "layer's range. Share values after training, by share_weights."
            )
        if self._trained is None or self._trained() is not pl_module:
            self._forget()
            self._trained = weakref.ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the values of a run that is resumed."""
        if self._codes is not None:
            self._hold(trainer, pl_module, self._codes)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose values, if this is the first batch of an epoch and they are due."""
        if self._codes is not None and pruned_so_far(trainer) != self._pruned:
            self._forget()  # a guard took the last pruning step back
        due = trainer.current_epoch >= self.epoch and batch_idx == 0  # no gradient is half accumulated
        if self._codes is not None or not due or not pruning_finished(trainer):
            return
        self.report = share_weights(
            pl_module,
            self.bits,
            module=self.module,
            ignore=self.ignore,
            parameters=self.parameters,
            optimizer=trainer.optimizers,
        )
        self._codes, self._pruned = self.report.codes, pruned_so_far(trainer)
        self._hold(trainer, pl_module, self._codes)
        entries = sum(weight.entries for weight in self.report.weights)
        values = sum(weight.values for weight in self.report.weights)
        rank_zero_info(f"{type(self).__name__}: {entries:,} weights share {values:,} values.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove hooks."""
        self._release()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where pruning, or training, ended too early, or no batch was trained."""
        if self._codes is None:
            waits = ", as pruning was not done" if pruning_callbacks(trainer) and not pruning_finished(trainer) else ""
            rank_zero_warn(
                f"{type(self).__name__}(epoch={self.epoch}): no epoch began in which weights could share values{waits}."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove hooks, which Lightning leaves here."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove hooks."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the codes, and how far pruning had come when they were chosen."""
        codes = None if self._codes is None else packed_codes(self._codes)
        return {"codes": codes, "pruned": self._pruned, "asked": compared_arguments(self, None)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved state; with other arguments values are chosen anew."""
        warn_of_changes(self, state_dict["asked"])
        self._codes, self._pruned = state_dict["codes"], list(state_dict["pruned"])
        if state_dict["asked"] != compared_arguments(self, None):
            self._codes = None

    def __repr__(self) -> str:
        """Return the call that makes this callback."""
        given = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model."""
        return {**self.__dict__, "_trained": None, "_shared": None}

    def _hold(self, trainer: Trainer, pl_module: LightningModule, codes: Mapping[str, Tensor]) -> None:
        self._release()
        self._shared = SharedValues(pl_module, codes)
        self._shared.hold(trainer.optimizers)

    def _release(self) -> None:
        if self._shared is not None:
            self._shared.release()
        self._shared = None

    def _forget(self) -> None:
        self._release()
        self._codes, self._pruned, self.report = None, [], None
