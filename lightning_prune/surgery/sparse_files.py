"""Stores weights that are mostly zero in little space, and brings them back to the last bit; knows no Trainer."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.model.bits import pack_bits, unpack_bits
from lightning_prune.model.errors import PruningError
from lightning_prune.model.inference_mode import changes_model
from lightning_prune.surgery import RECIPE, PackedMasks, take_shapes_

__all__ = ["SparseReport", "StoredTensor", "load_sparse", "load_sparse_", "save_sparse"]


class StoredTensor(NamedTuple):
    """How a tensor is stored: its name, the form, how many of its entries, bytes before and after."""

    name: str
    form: str
    entries: int
    bytes_before: int
    bytes_after: int


class SparseReport(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: Every tensor, and how it is stored.
        bytes_before: Bytes of all tensors, stored densely.
        bytes_after: Size of the file, in bytes.
    """

    tensors: tuple[StoredTensor, ...]
    bytes_before: int
    bytes_after: int


def save_sparse(model: nn.Module | Mapping[str, Tensor], path: str | Path) -> SparseReport:
    """Write a model's weights into a safetensors file, each tensor in the smallest of three forms.

    These are dense; the entries that are left beside one bit for each entry (``bitmask``); the entries that are left
    beside their columns and the places where rows begin (``csr``). Of a masked weight those entries are left that its
    mask leaves, so that masks come back, too; a zero that a mask holds comes back without a sign. The file is read back
    and compared before it takes its place; nothing in it is code.

    Args:
        model: A model, or a state dict.
        path: The file, such as ``model.safetensors``.

    Returns:
        How each tensor is stored, and bytes before and after.

    Raises:
        PruningError: If the state dict holds something that is no tensor, or the file does not give back what was
            written.

    Examples:
        >>> import tempfile
        >>> from lightning_prune import prune_weights
        >>> model = nn.Linear(400, 400)
        >>> _ = prune_weights(model, 0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = save_sparse(model, f"{folder}/model.safetensors")
        >>> report.tensors[0].form, report.bytes_after < report.bytes_before / 5
        ('bitmask', True)
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if strange := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        kind = type(state[strange]).__name__
        raise PruningError(f"save_sparse: {strange!r} is {kind}, and only tensors can be kept.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    stored = _write(state, unfinished)
    found = load_sparse(unfinished)
    for name, tensor in state.items():
        if not torch.equal(found[name].nan_to_num(), tensor.detach().cpu().nan_to_num()):
            unfinished.unlink()
            raise PruningError(
                f"save_sparse: {name} was read back from {unfinished} otherwise than it was written. {path} is as it "
                "was; look whether its disk is full or failing, and save again."
            )
    os.replace(unfinished, path)
    return SparseReport(tuple(stored), sum(tensor.bytes_before for tensor in stored), path.stat().st_size)


def _write(state: Mapping[str, Tensor], path: Path) -> list[StoredTensor]:
    """Write each tensor in its smallest form; tensors under several names under the first."""
    recipe = getattr(state, "_metadata", {}).get("", {}).get(RECIPE) or {}
    masks: PackedMasks = recipe.get("masks", {})
    told: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Tensor] = {}
    stored = []
    for name, first in _firsts(state).items():
        if first != name:
            told[name] = {"same": first}
            continue
        value = state[name].detach().cpu().contiguous()
        left = unpack_bits(*masks[name]).expand(value.shape) if name in masks else _not_zero(value)
        found = {form: encode(value, left) for form, (encode, _) in _FORMS.items()}
        form = min(found, key=lambda form: _size(found[form]))
        told[name] = {"form": form, "shape": list(value.shape), "masked": name in masks}
        arrays |= {f"{name}//{part}": array for part, array in found[form].items()}
        stored.append(StoredTensor(name, form, found[form]["values"].numel(), value.nbytes, _size(found[form])))
    header = {"version": 1, "tensors": told, "attributes": recipe.get("attributes")}
    save_file(arrays, path, metadata={RECIPE: json.dumps(header)})
    return stored


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict that :func:`save_sparse` wrote, on the CPU.

    It carries what shapes cannot tell, so :func:`load_sparse_` is what loads it into a model of the original class.

    Raises:
        PruningError: If the file holds something else.
    """
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise PruningError(f"load_sparse: {path} is no safetensors file ({error}).") from error
    with opened as file:
        header = json.loads((file.metadata() or {}).get(RECIPE, "null"))
        if header is None:
            raise PruningError(f"load_sparse: {path} was not written by save_sparse. Read it with safetensors.")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    state: OrderedDict[str, Tensor] = OrderedDict()
    masks: PackedMasks = {}
    for name, told in header["tensors"].items():
        if "same" in told:
            state[name] = state[told["same"]]
            continue
        parts = {key.rpartition("//")[2]: array for key, array in arrays.items() if key.rpartition("//")[0] == name}
        left, value = _FORMS[told["form"]][1](parts, told["shape"])
        state[name] = value
        if told["masked"]:
            masks[name] = [pack_bits(left), list(value.shape)]
    metadata: dict[str, Any] = {"version": 1}
    if header["attributes"] is not None:
        metadata[RECIPE] = {"attributes": header["attributes"], "masks": masks}
    state._metadata = OrderedDict({"": metadata})  # type: ignore[attr-defined]
    return state


@changes_model
def load_sparse_(model: nn.Module, path: str | Path) -> None:
    """Load what :func:`save_sparse` wrote into a model of the original class, which takes its shapes and masks."""
    state = load_sparse(path)
    take_shapes_(model, state, "", state._metadata[""])  # type: ignore[attr-defined]
    model.load_state_dict(state)


def _firsts(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for every name the first under which the same tensor stands."""
    seen: dict[Any, str] = {}
    return {
        name: seen.setdefault((t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else name, name)
        for name, t in state.items()
    }


def _not_zero(value: Tensor) -> Tensor:
    """Tell which entries are not a zero without a sign."""
    found = value != 0
    return found | value.signbit() if value.is_floating_point() else found


def _size(parts: Mapping[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


_Parts = dict[str, Tensor]


def _to_dense(value: Tensor, left: Tensor) -> _Parts:
    return {"values": value}


def _from_dense(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    return torch.ones(shape, dtype=torch.bool), parts["values"]


def _to_bitmask(value: Tensor, left: Tensor) -> _Parts:
    return {"values": value[left], "bits": pack_bits(left)}


def _from_bitmask(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    left = unpack_bits(parts["bits"], shape)
    value = torch.zeros(shape, dtype=parts["values"].dtype)
    value[left] = parts["values"]
    return left, value


def _to_csr(value: Tensor, left: Tensor) -> _Parts:
    count = len(left) if left.dim() else 1
    rows = left.reshape(count, left.numel() // max(count, 1))
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), rows.sum(dim=1).cumsum(0)])
    width = rows.shape[1]
    index = torch.uint8 if width <= 2**8 else torch.int16 if width <= 2**15 else torch.int32
    return {"values": value[left], "columns": rows.nonzero()[:, 1].to(index), "begins": begins.to(torch.int32)}


def _from_csr(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    begins = parts["begins"].long()
    left = torch.zeros(shape, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(len(begins) - 1), begins.diff())
    left.view(len(begins) - 1, left.numel() // max(len(begins) - 1, 1))[rows, parts["columns"].long()] = True
    value = torch.zeros(shape, dtype=parts["values"].dtype)
    value[left] = parts["values"]
    return left, value


_FORMS: dict[str, tuple[Callable[[Tensor, Tensor], _Parts], Callable[[_Parts, list[int]], tuple[Tensor, Tensor]]]] = {
    "dense": (_to_dense, _from_dense),
    "bitmask": (_to_bitmask, _from_bitmask),
    "csr": (_to_csr, _from_csr),
}
"""Form -> how to write and how to read it; of forms that are as small the first counts."""
