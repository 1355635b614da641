"""Models and data that nobody should train on, or that few do."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_prune
from benchmarks.trust.nonsense.arguments import CALLBACKS
from benchmarks.trust.nonsense.promises import fit_or_refuse, images
from benchmarks.trust.runs import CLASSES, IMAGE, Net

__all__ = ["MODELS", "with_models"]


class Bare(Net):
    """Without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "norm", "second", "hidden", "drop", "head"):
            delattr(self, name)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :CLASSES].clone().requires_grad_()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


class Single(Net):
    """One layer alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "norm", "second", "hidden", "drop"):
            delattr(self, name)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1)[:, :10])


class Shared(Net):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth.weight = self.third.weight

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(images)))))
        x = self.fourth(F.relu(self.third(x))).mean(dim=(2, 3))
        return self.head(self.drop(F.relu(self.hidden(x))))


class Idle(Net):
    """With a layer that nothing runs through."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.empty = nn.Linear(3, 3), nn.Parameter(torch.zeros(0, 4))


class Diverging(Net):
    """With a loss that is no number from the third step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 2 else 1.0)


class Named(Net):
    """Whose forward returns a dict, of which the loss is told apart."""

    def forward(self, images: Tensor) -> Any:
        return {"scores": super().forward(images), "about": "images"}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])["scores"], batch[1])


def _frozen(module: Net, some: bool = False) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(some and name.startswith("head"))


def _filled(value: float, name: str, module: Net) -> None:
    for own, parameter in module.named_parameters():
        if own.startswith(name):
            with torch.no_grad():
                parameter.view(-1)[:2] = value


_KINDS: dict[str, type[Net]] = {
    kind.__name__.lower(): kind for kind in (Net, Bare, Single, Shared, Idle, Diverging, Named)
}
_CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda module: None,
    "frozen": _frozen,
    "frozen but the head": lambda module: _frozen(module, some=True),
    "NaN": lambda module: _filled(float("nan"), "head", module),
    "infinity": lambda module: _filled(float("inf"), "first", module),
    "zeros": lambda module: _filled(0.0, "", module),
    "on meta": lambda module: module.to("meta"),
    "double": lambda module: module.double(),
    "in eval mode": lambda module: module.eval(),
    "compiled": lambda module: module.compile(backend="eager"),
}


_DATA: dict[str, Callable[[], Any]] = {
    "images": images,
    "one": lambda: images(1, 1),
    "none": lambda: images(0, 4),
    "integers": lambda: images(kind=torch.int64),
    "double": lambda: images(kind=torch.float64),
    "empty batches": lambda: DataLoader([(torch.zeros(0, *IMAGE), torch.zeros(0, dtype=torch.int64))] * 3, None),
    "NaN": lambda: DataLoader([(torch.full((2, *IMAGE), float("nan")), torch.zeros(2, dtype=torch.int64))] * 3, None),
    "tensors alone": lambda: DataLoader(torch.randn(8, *IMAGE), 4),
    "dicts": lambda: DataLoader([{"x": torch.randn(*IMAGE)}] * 4, 2),
}
MODELS = st.tuples(
    st.sampled_from(CALLBACKS), st.sampled_from(list(_KINDS)), st.sampled_from(list(_CHANGES)),
    st.one_of(st.just("images"), st.sampled_from(list(_DATA))), st.sampled_from([0, 1, 2]),
)  # fmt: skip


def with_models(case: tuple[str, str, str, str, int]) -> str:
    """Train a model on data, one or both of them odd."""
    name, model, change, data, start = case
    schedule: dict[str, Any] = {"epoch": start} if name == "OBSOneShot" else {
        "schedule": lightning_prune.OneShot(max(start, int(name == "TaylorFilterPruning")))
    }  # fmt: skip
    callback = getattr(lightning_prune, name)(0.5, **schedule)
    return fit_or_refuse(_KINDS[model], [callback], _DATA[data](), _CHANGES[change])
