"""What must hold whatever is fed: it works, or it is refused in words and leaves no trace; feeds nothing itself."""

import copy
import io
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from benchmarks.trust.runs import CLASSES, IMAGE, Net, trainer
from benchmarks.trust.soak import hooks_on
from lightning_prune import PruningError

__all__ = ["assert_whole", "fit", "fit_or_refuse", "images", "ours", "promise"]

REFUSALS = (PruningError, ValueError, TypeError, MisconfigurationException)
OURS = Path(lightning_prune.__file__).parent


def fit_or_refuse(
    kind: type[Net],
    callbacks: list[Callback],
    data: Any,
    change: Callable[[Any], Any] = lambda module: None,
    ckpt_path: Path | None = None,
    runs: bool = True,
) -> str:
    """Train; return what came of it, or raise AssertionError if it broke its promise."""
    torch.manual_seed(0)
    module = kind()
    change(module)
    before = _picture(module)
    try:
        fit(module, callbacks, data, ckpt_path)
    except Exception as error:
        if ckpt_path is None and not isinstance(error, PruningError) and _fails_without(kind, data, change):
            return "fails without pruning, too"
        told = isinstance(error, REFUSALS) and bool(str(error))
        theirs = ckpt_path is not None and not ours(error)  # torch and Lightning read files, too
        promise(isinstance(error, PruningError) or theirs or (told and ckpt_path is None), repr(error))
        steps = module._trainer.global_step if module._trainer is not None else 0
        if not steps and ckpt_path is None:
            promise(not hooks_on(module), f"hooks stay: {hooks_on(module)}")
            promise(_same(before, _picture(module)), f"refused, and changed all the same: {error}")
        if runs:
            assert_whole(module)
        return f"refused {'later' if steps else 'before the first step'}"
    if runs:
        assert_whole(module)
    return "works"


def fit(module: pl.LightningModule, callbacks: list[Callback], data: Any, ckpt_path: Path | None = None) -> pl.Trainer:
    """Train for three epochs, in silence."""
    made = trainer(*callbacks, max_epochs=3)
    torch.manual_seed(1)
    with redirect_stdout(io.StringIO()):
        made.fit(module, data, ckpt_path=ckpt_path)
    return made


def _fails_without(kind: type[Net], data: Any, change: Callable[[Any], Any]) -> bool:
    module = kind()
    change(module)
    try:
        fit(module, [], data)
    except Exception:
        return True
    return False


def _picture(module: nn.Module) -> dict[str, Any]:
    values = {name: value if value.is_meta else value.detach().clone() for name, value in module.state_dict().items()}
    return {"shown": repr(module), "values": values, "modes": [part.training for part in module.modules()]}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    values = [(value, other["values"].get(name)) for name, value in one["values"].items()]
    equal = all(
        b is not None and a.shape == b.shape and (a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in values
    )
    return equal and (one["shown"], one["modes"]) == (other["shown"], other["modes"])


def promise(kept: bool, broken: str) -> None:
    """Raise what is broken, unless it is kept."""
    if not kept:
        raise AssertionError(broken)


def assert_whole(module: Net) -> None:
    """Assert that a module runs, whatever it has lost."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    kinds = {parameter.dtype for parameter in module.parameters()} or {torch.float32}
    with torch.no_grad():
        copy.copy(module).eval()(torch.zeros(2, *IMAGE, dtype=kinds.pop()))


def images(count: int = 16, batch: int = 4, kind: torch.dtype = torch.float32) -> DataLoader:
    """Return so many examples, always the same."""
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(count, *IMAGE, generator=generator).to(kind)
    return DataLoader(TensorDataset(made, torch.randint(CLASSES, (count,), generator=generator)), batch)


def ours(error: BaseException) -> bool:
    """Tell whether code of the library raised an error, or called what raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return OURS in Path(last.filename).parents
