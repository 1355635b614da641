"""Stores weights that are mostly zero in little space, and brings them back to the last bit; knows no Trainer."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.model.bits import pack_bits, unpack_bits
from lightning_prune.model.byte_streams import compress, decompress, distances, places
from lightning_prune.model.errors import PruningError
from lightning_prune.model.torch_modes import changes_model
from lightning_prune.surgery import RECIPE, PackedMasks, Told, checked, recipes_in
from lightning_prune.surgery.loading import load_told_

__all__ = ["SparseReport", "StoredTensor", "load_sparse", "load_sparse_", "save_sparse"]


_VERSION = 2
_OWN = frozenset({"version", "attributes", "masks"})  # of a recipe, what the file has in a place of its own
_MOST_VALUES, _SAMPLE = 256, 4096  # values that a byte tells apart; entries that are looked at first
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an entry -> integers of that size
_LEAST, _MOST_TIMES = 64 * 2**20, 1024  # bytes that a file may stand for: some, and so many times its own
_SMALL = 64 * _MOST_TIMES  # bytes of a tensor for which its line in the header makes up


class StoredTensor(NamedTuple):
    """How a tensor is stored: its name, the form, how many of its entries and values, bytes before and after."""

    name: str
    form: str
    entries: int
    values: int
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
    """Write a model's weights into a safetensors file, each tensor in the smallest of four forms.

    These are dense; the entries that are left beside one bit for each entry (``bitmask``); the entries that are left
    beside their columns and the places where rows begin (``csr``); and, where entries share at most 256 values, as
    after :func:`~lightning_prune.pruning.sharing.share_weights`, these values, compressed codes and the compressed
    distances between entries that are left (``shared``). Of a masked weight those entries are left that its
    mask leaves, so that masks come back, too; a zero that a mask holds comes back without a sign. The file is read back
    and compared before it takes its place; nothing in it is code.

    Args:
        model: A model, or a state dict.
        path: The file, such as ``model.safetensors``.

    Returns:
        How each tensor is stored, and bytes before and after.

    Raises:
        PruningError: If the state dict holds something that is no dense tensor, or the file cannot be written or does
            not give back what was written. An earlier file at ``path`` is as it was, and none is left half written.

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
    for name, value in state.items():
        _refuse_unstorable(name, value)
    recipes = recipes_in(state)
    path = Path(path)
    unfinished = path.parent / f"{path.name}.unfinished"
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = _write(state, recipes, unfinished)
        found = load_sparse(unfinished)
        for name, tensor in state.items():
            if not torch.equal(_comparable(found[name]), _comparable(tensor.detach().cpu())):
                raise PruningError(f"{name} was read back otherwise than it was written")
        size = unfinished.stat().st_size
        os.replace(unfinished, path)
    except (OSError, SafetensorError, PruningError) as error:
        raise PruningError(
            f"save_sparse: {path} could not be written ({error}), and what was there is as it was. Look whether the "
            "disk is full or failing and the folder can be written to, and save again."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()  # gone already, unless something failed or was interrupted
    return SparseReport(tuple(stored), sum(tensor.bytes_before for tensor in stored), size)


def _refuse_unstorable(name: str, value: Any) -> None:
    """Refuse what is no tensor of plain numbers.

    Raises:
        PruningError: Saying what it is.
    """
    if not isinstance(value, Tensor):
        raise PruningError(f"save_sparse: {name!r} is {type(value).__name__}, and only tensors can be kept.")
    kind = type(value).__name__ if type(value) not in (Tensor, nn.Parameter) else ""
    if value.is_meta or value.is_quantized or value.layout != torch.strided or kind:
        what = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else kind or value.layout
        raise PruningError(
            f"save_sparse: {name!r} is {what}, and only dense tensors can be kept. Save before weights are converted."
        )


def _write(state: Mapping[str, Tensor], recipes: Told, path: Path) -> list[StoredTensor]:
    """Write each tensor in its smallest form; tensors under several names under the first."""
    masks: PackedMasks = {
        f"{path}.{leaf}".removeprefix("."): mask
        for path, recipe in recipes.items()
        for leaf, mask in recipe["masks"].items()
    }
    told: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Tensor] = {}
    stored = []
    for name, first in _firsts(state).items():
        if first != name:
            told[name] = {"same": first}
            continue
        value = state[name].detach().cpu().contiguous()
        left = unpack_bits(*masks[name]).expand(value.shape) if name in masks else _not_zero(value)
        found = {}
        for form, (encode, _) in _FORMS.items():
            parts = encode(value, left)
            # A file that stands for very much is refused when it is read: it could be made to fill memory.
            if parts is not None and value.nbytes <= max(_SMALL, _MOST_TIMES * _size(parts)):
                found[form] = parts
        form = min(found, key=lambda form: _size(found[form]))
        told[name] = {"form": form, "shape": list(value.shape), "masked": name in masks}
        arrays |= {f"{name}//{part}": array for part, array in found[form].items()}
        entries = value.numel() if form == "dense" else int(left.count_nonzero())
        values = found[form]["values"].numel()
        stored.append(StoredTensor(name, form, entries, values, value.nbytes, _size(found[form])))
    attributes = {path: recipe["attributes"] for path, recipe in recipes.items()}
    header = {"version": _VERSION, "tensors": told, "attributes": attributes}
    others = {path: {key: of[key] for key in of.keys() - _OWN} for path, of in recipes.items()}
    header["others"] = {path: of for path, of in others.items() if of}
    save_file(arrays, path, metadata={RECIPE: json.dumps(header)})
    return stored


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict that :func:`save_sparse` wrote, on the CPU.

    It carries what shapes cannot tell, so :func:`load_sparse_` is what loads it into a model of the original class.

    Raises:
        PruningError: If the file holds something else, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(RECIPE, "null"))
            if header is None:
                raise PruningError(f"load_sparse: {path} was not written by save_sparse. Read it with safetensors.")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        return _decoded(header, arrays, Path(path).stat().st_size)
    except SafetensorError as error:
        raise PruningError(f"load_sparse: {path} is no safetensors file ({error}).") from error
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise PruningError(
            f"load_sparse: {path} is damaged, or another version of lightning_prune wrote it ({error!r}). Save again."
        ) from error


def _decoded(header: dict[str, Any], arrays: Mapping[str, Tensor], size: int) -> OrderedDict[str, Tensor]:
    """Make the state dict that a header and arrays of a file stand for.

    Raises:
        ValueError: If they contradict each other, before anything is made of them.
    """
    if header["version"] != _VERSION:
        raise ValueError(f"version {header['version']!r} instead of {_VERSION}")
    parts: dict[str, _Parts] = {name: {} for name in header["tensors"]}
    for key, array in arrays.items():
        name, _, part = key.rpartition("//")
        parts[name][part] = array
    whole = 0
    for name, told in header["tensors"].items():
        if "same" in told:
            continue
        if not isinstance(told["masked"], bool) or any(
            type(length) is not int or length < 0 for length in told["shape"]
        ):
            raise ValueError(f"{name}: {told}")
        whole += math.prod(told["shape"]) * parts[name]["values"].element_size()
    if whole > _LEAST + _MOST_TIMES * size:
        raise ValueError(f"{size} bytes that stand for {whole}")
    state: OrderedDict[str, Tensor] = OrderedDict()
    masks: dict[str, PackedMasks] = {}
    for name, told in header["tensors"].items():
        if "same" in told:
            state[name] = state[told["same"]]
            continue
        left, state[name] = _FORMS[told["form"]][1](parts[name], told["shape"])
        if told["masked"]:
            path, _, leaf = name.rpartition(".")
            masks.setdefault(path, {})[leaf] = [pack_bits(left), list(state[name].shape)]
    metadata: dict[str, Any] = {"": {"version": 1}}
    for path, attributes in header["attributes"].items():
        others = header.get("others", {}).get(path, {})
        recipe = {**others, "version": 1, "attributes": attributes, "masks": masks.get(path, {})}
        metadata[path] = {"version": 1, RECIPE: recipe}
    checked({path: of[RECIPE] for path, of in metadata.items() if RECIPE in of})
    state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return state


@changes_model
def load_sparse_(model: nn.Module, path: str | Path) -> None:
    """Load what :func:`save_sparse` wrote into a model of the original class, which takes its shapes and masks.

    Raises:
        PruningError: If the file is damaged or of another model. The model is as it was.
    """
    state = load_sparse(path)
    load_told_("load_sparse_", model, state, recipes_in(state))


def _firsts(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for every name the first under which the same tensor stands."""
    seen: dict[Any, str] = {}
    return {
        name: seen.setdefault((t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else name, name)
        for name, t in state.items()
    }


def _comparable(value: Tensor) -> Tensor:
    """Return a tensor with numbers in place of NaN, in a type that has operators: floats of one byte have none."""
    return (value.float() if value.is_floating_point() and value.element_size() == 1 else value).nan_to_num()


def _not_zero(value: Tensor) -> Tensor:
    """Return which entries are not a zero without a sign."""
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()
    found = value != 0
    return found | value.signbit() if value.is_floating_point() else found


def _size(parts: Mapping[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


_Parts = dict[str, Tensor]


def _to_dense(value: Tensor, left: Tensor) -> _Parts:
    return {"values": value}


def _from_dense(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    _agree(list(parts["values"].shape) == shape)
    return torch.ones(shape, dtype=torch.bool), parts["values"]


def _to_bitmask(value: Tensor, left: Tensor) -> _Parts:
    return {"values": value[left], "bits": pack_bits(left)}


def _from_bitmask(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    values, bits = parts["values"], parts["bits"]
    _agree(bits.dtype == torch.uint8 and bits.dim() == 1 and len(bits) == -(-math.prod(shape) // 8))
    left = unpack_bits(bits, shape)
    _agree(values.dim() == 1 and len(values) == int(left.sum()))
    value = torch.zeros(shape, dtype=values.dtype)
    value[left] = values
    return left, value


def _to_csr(value: Tensor, left: Tensor) -> _Parts:
    count = len(left) if left.dim() else 1
    rows = left.reshape(count, left.numel() // max(count, 1))
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), rows.sum(dim=1).cumsum(0)])
    width = rows.shape[1]
    index = torch.uint8 if width <= 2**8 else torch.int16 if width <= 2**15 else torch.int32
    return {"values": value[left], "columns": rows.nonzero()[:, 1].to(index), "begins": begins.to(torch.int32)}


def _from_csr(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    values, columns, begins = parts["values"], parts["columns"].long(), parts["begins"].long()
    count = shape[0] if shape else 1
    width = math.prod(shape) // max(count, 1)
    _agree(values.dim() == columns.dim() == begins.dim() == 1 and len(begins) == count + 1)
    _agree(len(values) == len(columns) == int(begins[-1]) and int(begins[0]) == 0 and bool((begins.diff() >= 0).all()))
    _agree(not len(columns) or (int(columns.min()) >= 0 and int(columns.max()) < width))
    left = torch.zeros(shape, dtype=torch.bool)
    left.view(count, width)[torch.repeat_interleave(torch.arange(count), begins.diff()), columns] = True
    _agree(int(left.sum()) == len(values))  # no column twice in a row
    value = torch.zeros(shape, dtype=values.dtype)
    value[left] = values
    return left, value


def _to_shared(value: Tensor, left: Tensor) -> _Parts | None:
    """Return the values, the code of each entry that is left, and the distances between these."""
    if value.itemsize not in _BITS or not value.numel():
        return None
    bits = value.view(_BITS[value.itemsize])  # compared as bits: zeros keep their sign, and NaN equals itself
    kept = bits[left]
    if len(kept[:_SAMPLE].unique()) > _MOST_VALUES:
        return None
    values = kept.unique()
    if not 0 < len(values) <= _MOST_VALUES:
        return None
    parts = {"values": values.view(value.dtype)}
    least = value.nbytes // _MOST_TIMES + 1
    if left.all():
        return {**parts, "codes": compress(torch.searchsorted(values, kept), least)}
    ordered = {}
    for order, dims in (("rows", (0, 1)), ("columns", (1, 0))):
        matrix = _matrix(left).permute(dims)
        ordered[order] = compress(distances(matrix.reshape(-1)))
    order = min(ordered, key=lambda order: len(ordered[order]))
    if order == "columns":
        kept = _matrix(bits).T[_matrix(left).T]
    return {**parts, "codes": compress(torch.searchsorted(values, kept), least), order: ordered[order]}


def _from_shared(parts: _Parts, shape: list[int]) -> tuple[Tensor, Tensor]:
    values, size = parts["values"], math.prod(shape)
    _agree(values.dim() == 1 and 0 < len(values) <= _MOST_VALUES)
    left = torch.ones(shape, dtype=torch.bool)
    columns = "columns" in parts
    if columns or "rows" in parts:
        flat = places(decompress(parts["columns" if columns else "rows"], size), size)
        matrix = _matrix(left)
        matrix.copy_(flat.view(matrix.T.shape).T if columns else flat.view(matrix.shape))
    codes = decompress(parts["codes"], size).long()
    _agree(len(codes) == int(left.sum()) and int(codes.max()) < len(values))
    value = torch.zeros(shape, dtype=values.dtype)
    if columns:
        _matrix(value).T[_matrix(left).T] = values[codes]
    else:
        value[left] = values[codes]
    return left, value


def _matrix(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as a matrix that shares its memory: rows are those of its first dimension."""
    count = len(tensor) if tensor.dim() else 1
    return tensor.view(count, tensor.numel() // max(count, 1))


def _agree(fact: bool) -> None:
    """Refuse parts of a tensor that contradict each other or its shape."""
    if not fact:
        raise ValueError("the parts of a tensor do not fit its shape")


_Encode = Callable[[Tensor, Tensor], _Parts | None]
_Decode = Callable[[_Parts, list[int]], tuple[Tensor, Tensor]]
_FORMS: dict[str, tuple[_Encode, _Decode]] = {
    "dense": (_to_dense, _from_dense),
    "bitmask": (_to_bitmask, _from_bitmask),
    "csr": (_to_csr, _from_csr),
    "shared": (_to_shared, _from_shared),
}
"""Form -> how to write it, if it can be, and how to read it; of forms that are as small the first counts."""
