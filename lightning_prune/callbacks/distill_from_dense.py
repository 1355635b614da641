"""Trains the pruned network to answer as the dense one did."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.callbacks.engine.guard import Companion
from lightning_prune.callbacks.engine.pruning_callback import pruning_callbacks
from lightning_prune.callbacks.engine.settings import compared_arguments, warn_of_changes
from lightning_prune.callbacks.engine.teacher import Call, Calls, Teacher, channels_of, followed
from lightning_prune.model.errors import PruningError
from lightning_prune.surgery import Cut

__all__ = ["DistillFromDense"]

Loss = Callable[[Any, Any], Tensor]
"""What the pruned network returned, and the dense one -> a loss, ``()``."""


@dataclass
class _State:
    """Everything that changes in the life of the callback.

    Attributes:
        path: Of the network inside the module, once it is known.
        teacher: The dense network, once pruning has begun.
        snapshot: What the teacher is built from when training starts, after a checkpoint was loaded.
        kept: Layer -> which of the teacher's channels are left; layers without entry are whole.
    """

    path: str | None = None
    teacher: Teacher | None = None
    snapshot: Mapping[str, Any] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


class DistillFromDense(Companion):
    """Add the loss of distillation from the network as it was before the first pruning step (Hinton et al. 2015).

    Put it beside any of our pruning callbacks. Before the first pruning step the network is copied; the copy, frozen
    and in eval mode, is the teacher. From then on it answers to every input of a training step, and the distance of
    the pruned network's answer is added to the loss of ``training_step``, which needs no change. The teacher is no
    part of the module: it is not pruned, counted, averaged or moved, and a checkpoint holds it once.

    Args:
        weight: What the distillation loss is multiplied by before it is added.
        loss: ``"kl"``: ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, in nats, averaged over all but the
            dimension of classes. ``"mse"``: the mean squared difference, for regression. Or a function of what the
            pruned and the dense network returned.
        temperature: ``T`` above.
        class_dim: Dimension of the classes in the output: the last, or 1 for segmentation.
        features: Layers inside the network (convolutions, linear and normalization layers, by path) whose outputs
            follow the teacher's on the channels that are left (Romero et al. 2015): the mean squared difference,
            divided by the teacher's mean square, averaged over the layers.
        feature_weight: What that is multiplied by.
        module: The network that is distilled, as a path or the module itself. By default the outermost one that the
            training step calls.

    Raises:
        ValueError: If an argument is out of range.
        PruningError: When training starts: without a pruning callback, or with manual optimization. At the first step
            after pruning: if the network returns no tensor that the loss could compare.

    Examples:
        >>> distillation = DistillFromDense(weight=0.5, temperature=4.0)
    """

    def __init__(
        self,
        weight: float = 1.0,
        loss: Literal["kl", "mse"] | Loss = "kl",
        temperature: float = 2.0,
        class_dim: int = -1,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
        module: str | nn.Module | None = None,
    ) -> None:
        where = type(self).__name__
        if not 0 <= weight < math.inf:
            raise ValueError(f"{where}(weight={weight!r}): a loss is multiplied by it; pass a number from 0.")
        if not 0 <= feature_weight < math.inf:
            raise ValueError(f"{where}(feature_weight={feature_weight!r}): pass a number from 0.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"{where}(temperature={temperature!r}): logits are divided by it; pass a number above 0.")
        if not callable(loss) and loss not in ("kl", "mse"):
            raise ValueError(f"{where}(loss={loss!r}): choose 'kl', 'mse' or a function.")
        if isinstance(features, str):
            raise ValueError(f"{where}(features={features!r}): pass a list of names.")
        self.weight = weight
        self.loss = loss
        self.temperature = temperature
        self.class_dim = class_dim
        self.features = list(features)
        self.feature_weight = feature_weight
        self.module = module
        self._trained: weakref.ref[LightningModule] | None = None  # which the state is of
        self._calls: Calls | None = None
        self._channels: dict[str, tuple[str, int, int]] = {}  # of each layer of features: see channels_of
        self._state = _State()

    @property
    def teacher(self) -> nn.Module | None:
        """The dense network, once pruning has begun."""
        return None if self._state.teacher is None else self._state.teacher.network

    @property
    def state_key(self) -> str:
        """Name what is distilled, which tells two callbacks apart."""
        return self._generate_state_key(module=self.module if isinstance(self.module, str) else None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run in which nothing is pruned, or in which the loss is not Lightning's to change."""
        if stage != "fit":
            return
        where = type(self).__name__
        if not pruning_callbacks(trainer):
            raise PruningError(
                f"{where} keeps the network from before pruning, and no callback prunes. Add FilterL1Pruning or "
                "another."
            )
        if not pl_module.automatic_optimization:
            raise PruningError(
                f"{where}: {type(pl_module).__name__} optimizes manually, so it is not known which of its losses is "
                "the network's. Leave the callback out, and add the loss in training_step."
            )
        if self._trained is None or self._trained() is not pl_module:
            self._state = _State()
            self._trained = weakref.ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names, and note from now on what the training step calls."""
        self._state.path = self._named(pl_module)
        self._channels = {layer: channels_of(type(self).__name__, pl_module, layer) for layer in self.features}
        if self._state.snapshot is not None:
            self._state.teacher = Teacher(pl_module.get_submodule(self._state.path or ""), self._state.snapshot)
            self._state.snapshot = None
        self._calls = Calls(pl_module, self._state.path, self.features)

    def before_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network before the first pruning step."""
        if self._state.teacher is not None:
            return
        self._stop_listening()  # a copy of the hooks would note what the teacher does
        self._state.teacher = Teacher(pl_module.get_submodule(self._state.path or ""))
        self._calls = Calls(pl_module, self._state.path, self.features)

    def after_cut(self, trainer: Trainer, pl_module: LightningModule, cut: Cut) -> None:
        """Note which channels of the layers are left."""
        self._state.kept = followed(self._state.kept, self._channels, cut)

    def rollback_state(self) -> dict[str, Tensor]:
        """Return which channels of the layers are left."""
        return dict(self._state.kept)

    def rollback(self, state: dict[str, Tensor]) -> None:
        """Follow a cut that was rolled back."""
        self._state.kept = state

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Forget the calls of the step before."""
        if self._calls is not None:
            self._calls.clear()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the distillation loss, scaled as the loss is: by accumulation, and by the scaler of 16-bit training.

        Lightning divides the step's loss by the number of batches that are accumulated, so the tensor that it
        differentiates is its own, and can be added to in place.
        """
        if self._calls is None:
            return
        calls = self._calls.calls
        self._calls.clear()
        if self._state.path is None and calls:
            self._choose_path(pl_module, self._calls.paths)
        if self._state.teacher is None or not (self.weight or self.features):
            return
        if not calls:
            raise PruningError(
                f"{type(self).__name__}: the training step did not call "
                f"{self._state.path or type(pl_module).__name__}, so there is nothing to compare. Pass module= with "
                "the network that it calls."
            )
        with trainer.precision_plugin.forward_context():
            distance = torch.stack([self._distance(call) for call in calls]).mean()
        several = sum(isinstance(other, DistillFromDense) for other in trainer.callbacks) > 1  # type: ignore[attr-defined]
        name = f"prune/distillation/{self._state.path}" if several else "prune/distillation"  # equal names are averaged
        pl_module.log(name, distance.detach(), on_step=False, on_epoch=True, batch_size=1)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        added = distance / trainer.accumulate_grad_batches
        loss.add_(added if scaler is None else scaler.scale(added))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook."""
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove every hook."""
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher, and what is known of the network."""
        teacher = self._state.snapshot if self._state.teacher is None else self._state.teacher.state()
        asked = compared_arguments(self, None)
        return {"teacher": teacher, "path": self._state.path, "kept": self._state.kept, "asked": asked}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what a checkpoint holds; the teacher is built when training starts.

        Raises:
            PruningError: If layers are named of which the checkpoint does not tell which channels are left.
        """
        unknown = [layer for layer in self.features if layer not in state_dict["asked"]["features"]]
        if unknown and state_dict["teacher"] is not None:
            raise PruningError(
                f"{type(self).__name__}(features={self.features!r}): the checkpoint was written after a pruning step "
                f"with features={state_dict['asked']['features']!r}, and does not tell which channels are left of "
                f"{unknown[0]}. Name layers of those alone, or start anew."
            )
        warn_of_changes(self, state_dict["asked"])
        self._state = _State(state_dict["path"], None, state_dict["teacher"], dict(state_dict["kept"]))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model."""
        return {**self.__dict__, "_trained": None, "_calls": None}

    def _named(self, pl_module: LightningModule) -> str | None:
        """Return the path of the network, if it was named or found before."""
        if self.module is None:
            return self._state.path
        for path, part in pl_module.named_modules():
            if part is self.module or path == self.module:
                return path
        named = self.module if isinstance(self.module, str) else type(self.module).__name__
        raise PruningError(
            f"{type(self).__name__}(module={named!r}): {type(pl_module).__name__} has no such part. It has "
            f"{', '.join(name for name, _ in pl_module.named_children())}."
        )

    def _choose_path(self, pl_module: LightningModule, paths: set[str]) -> None:
        """Choose the network that the training step called for the one that is distilled."""
        if len(paths) > 1:
            named = " and ".join(sorted(path or type(pl_module).__name__ for path in paths))
            raise PruningError(
                f"{type(self).__name__}: the training step calls {named}. Pass module= with the one that is distilled."
            )
        self._state.path = next(iter(paths))
        if self._state.teacher is not None:  # of the whole module, since pruning began before the first step
            self._state.teacher = Teacher(self._state.teacher.network.get_submodule(self._state.path))

    def _distance(self, call: Call) -> Tensor:
        """Return the distillation loss of one call, ``()``."""
        assert self._state.teacher is not None
        prefix = f"{self._state.path}." if self._state.path else ""
        answer = self._state.teacher.answer(call, {layer: layer.removeprefix(prefix) for layer in self.features})
        distance = self.weight * self._loss(call.output, answer.output) if self.weight else torch.zeros(())
        if not self.features:
            return distance
        gaps = []
        for layer, (_, _, dim) in self._channels.items():
            self._refuse_not_called(layer, call)
            taught = answer.features[layer].float()
            if layer in self._state.kept:
                taught = taught.index_select(dim, self._state.kept[layer].to(taught.device))
            gaps.append(F.mse_loss(call.features[layer].float(), taught) / taught.square().mean().clamp_min(1e-12))
        return distance + self.feature_weight * torch.stack(gaps).mean()

    def _refuse_not_called(self, layer: str, call: Call) -> None:
        if layer not in call.features:
            raise PruningError(
                f"{type(self).__name__}(features=[{layer!r}]): the layer did not run in a call of "
                f"{self._state.path or 'the module'}. Name layers that every training step runs."
            )

    def _loss(self, student: Any, teacher: Any) -> Tensor:
        if callable(self.loss):
            return self.loss(student, teacher)
        answer, taught = self._output(student).float(), self._output(teacher).float()
        if self.loss == "mse":
            return F.mse_loss(answer, taught)
        if answer.dim() == 0 or answer.shape[self.class_dim] == 1:
            raise PruningError(
                f"{type(self).__name__}(loss='kl'): the network's output, {tuple(answer.shape)}, has one class along "
                f"dimension {self.class_dim}. Pass loss='mse', another class_dim, or a function."
            )
        log_p = F.log_softmax(answer / self.temperature, self.class_dim)
        log_q = F.log_softmax(taught / self.temperature, self.class_dim)
        each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(self.class_dim)
        return each.mean() * self.temperature**2

    def _output(self, output: Any) -> Tensor:
        """Return the tensor to compare: the output, its ``logits``, or the first of several."""
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        if isinstance(found, (tuple, list)) and found:
            found = found[0]
        if isinstance(found, Tensor) and found.is_floating_point():
            return found
        raise PruningError(
            f"{type(self).__name__}(loss={self.loss!r}): the network returns {type(output).__name__}, in which no "
            "logits were found. Pass loss= with a function of what the pruned and the dense network return."
        )

    def _stop_listening(self) -> None:
        if self._calls is not None:
            self._calls.remove()
            self._calls = None
