"""Outputs of operators in shape alone, for runs that need no values.

A *hollow* tensor has a shape, dtype and device, but its entries were never computed. Any output computed from a hollow
tensor is hollow. Code that reads an entry, or anything that depends on entries, cannot run this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["NumbersNeededError", "Shaped", "reads", "refuse_reading", "shaper", "writes"]

Shaped = Callable[..., Any]
"""From the arguments of an operator to its uncomputed output, or None where the operator must run."""


class NumbersNeededError(Exception):
    """A run on shapes alone reached code that needs values."""


def shaper(func: Any) -> Shaped | None:
    """Return the function that makes an operator's output in shape alone, or None if the operator must run."""
    return _SHAPED.get(func.overloadpacket)


def refuse_reading(func: Any, hollow: Iterable[Tensor]) -> None:
    """Refuse an operator whose output shape, or a value that Python sees, depends on entries of hollow tensors.

    Raises:
        NumbersNeededError: If it does, with the name of the operator.
    """
    exact = [t for t in hollow if not (t.is_floating_point() or t.is_complex())]
    counted = any(t.dtype is not torch.bool for t in exact)  # indices, which must lie in bounds
    moving = _decides_shape(func) and (exact or func._opname not in _INDEXING)
    if counted or moving or _returns_values(func):
        raise NumbersNeededError(f"{func.overloadpacket} depends on values that were not computed")


def reads(func: Any) -> bool:
    """Return whether an operator hands entries of a tensor to Python, whose code may branch on them."""
    return torch.Tag.data_dependent_output in func.tags


def writes(func: Any) -> bool:
    """Return whether an operator writes into an argument."""
    return bool(func._schema.is_mutable)


@cache
def _returns_values(func: Any) -> bool:
    return any("Tensor" not in str(value.type) for value in func._schema.returns)


@cache
def _decides_shape(func: Any) -> bool:
    return torch.Tag.dynamic_output_shape in func.tags


_INDEXING = ("index", "_unsafe_index")


def _of_floats(shaped: Shaped) -> Shaped:
    """Call a function below only where the operator's first tensor is of floating point; integers are computed."""

    @wraps(shaped)
    def guarded(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and not x.is_floating_point():
            return None
        return shaped(x, *args, **kwargs)

    return guarded


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _broadcast(a: Any, b: Any = None, *_: Any, **__: Any) -> Tensor | None:
    if not isinstance(a, Tensor):
        return None
    if not isinstance(b, Tensor):
        return torch.empty_like(a)
    if a.dtype is not b.dtype or a.device != b.device:
        return None
    if a.shape == b.shape:
        return torch.empty_like(a)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    for side in (a, b):
        if side.shape == shape:
            return torch.empty_like(side)  # with the layout in memory of the larger operand
    return a.new_empty(shape)


def _into(a: Tensor, b: Any, *_: Any, **__: Any) -> Tensor | None:
    fits = not isinstance(b, Tensor) or b.shape == a.shape or torch.broadcast_shapes(a.shape, b.shape) == a.shape
    return a if fits else None


def _anew(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _reduction(x: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor | None:
    if kwargs or not x.numel():
        return None
    rank = max(x.dim(), 1)
    reduced = (dim,) if isinstance(dim, int) else dim or range(rank)
    gone = {d % rank for d in reduced}
    sizes = []
    for d, size in enumerate(x.shape):
        if d not in gone:
            sizes.append(size)
        elif keepdim:
            sizes.append(1)
    return x.new_empty(sizes)


def _vector_norm(x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor | None:
    return _reduction(x, dim, keepdim, **kwargs)


def _resized(x: Tensor, size: Sequence[int] | None, *_: Any, **__: Any) -> Tensor | None:
    if size is None or not x.numel() or min(size) < 1:
        return None
    return x.new_empty((*x.shape[:2], *size)) if x.dim() == len(size) + 2 else None


def _padded(x: Tensor, pads: Sequence[int], *_: Any) -> Tensor | None:
    if len(pads) > 2 * x.dim():
        return None
    sizes = list(x.shape)
    for d in range(len(pads) // 2):
        sizes[-1 - d] += pads[2 * d] + pads[2 * d + 1]
    return x.new_empty(sizes) if min(sizes) > 0 else None


def _softmax(x: Tensor, dim: int, to_float: bool = False) -> Tensor | None:
    return None if to_float else _anew(x)  # contiguous, whatever the layout of x


def _clone(x: Tensor, *, memory_format: Any = None) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format or torch.preserve_format)


def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor | None:  # fmt: skip
    positions = x.dim() - 2
    first, second = weight.shape[:2]
    entering, made = second * groups, first
    if transposed:
        entering, made = first, second * groups
    fits = x.dim() == weight.dim() and x.shape[1] == entering and first % groups == 0 and x.dtype is weight.dtype
    if not fits or (bias is not None and len(bias) != made):
        return None  # the operator itself raises the error
    shape = [x.shape[0], made]
    for d in range(positions):
        step, pad, spread = stride[d % len(stride)], padding[d % len(padding)], dilation[d % len(dilation)]
        reach = spread * (weight.shape[d + 2] - 1)
        if transposed:
            shape.append((x.shape[d + 2] - 1) * step - 2 * pad + reach + output_padding[d % len(output_padding)] + 1)
        else:
            shape.append((x.shape[d + 2] + 2 * pad - reach - 1) // step + 1)
    return _laid_out_like(x, x.new_empty(shape)) if min(shape) > 0 else None


def _laid_out_like(x: Tensor, made: Tensor) -> Tensor:
    """Return ``made`` in channels-last memory format if ``x`` has it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or not _channels_last(x):
        return made
    return torch.empty_like(made, memory_format=last)


def _channels_last(x: Tensor) -> bool:
    """Return whether torch treats a tensor as channels-last; strides of dimensions of size one count, too."""
    least = 0
    # From the dimension that must be fastest in memory to the slowest, strides may only grow.
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[dim], x.stride(dim)
        if not size or stride < max(least, 1) or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size
    return True


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    fits = a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2] and a.dtype is b.dtype
    if not fits:
        return None
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _addmm(addend: Tensor, a: Tensor, b: Tensor, **_: Any) -> Tensor | None:
    out = _mm(a, b)
    if out is None or out.dtype is not addend.dtype:
        return None
    if any(own not in (1, size) for own, size in zip(addend.shape[::-1], out.shape[::-1], strict=False)):
        return None
    return out


def _batch_norm(x: Tensor, *args: Any, training: bool = False) -> Any:
    training = bool(args[4]) if len(args) > 6 else training
    channels = [value for value in args[:4] if isinstance(value, Tensor)]
    if x.dim() < 2 or any(value.shape[0] != x.shape[1] for value in channels):
        return None
    # In train mode it would also update running statistics, of what was not computed.
    wide = torch.promote_types(x.dtype, torch.float32)
    statistic = x.new_empty(x.shape[1], dtype=wide) if training else x.new_empty(0)
    return torch.empty_like(x), statistic, statistic


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    first = x.dim() - len(shape)
    fits = all(value is None or value.shape == x.shape[first:] for value in (weight, bias))
    if not fits or tuple(shape) != tuple(x.shape[first:]):
        return None
    statistic = x.new_empty((*x.shape[:first], *[1] * len(shape)))
    return x.new_empty(x.shape), statistic, statistic


def _pool(with_indices: bool, ceil_at: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a pooling; ``args``: kernel, stride, padding, dilation (maximum only), ... ceil_mode."""
    if not all(x.shape) or kwargs:
        return None
    dilation = args[3] if with_indices and len(args) > 3 else (1,)
    ceil = bool(args[ceil_at]) if len(args) > ceil_at else False
    kernel = args[0]
    stride = (args[1] if len(args) > 1 else ()) or kernel
    padding = args[2] if len(args) > 2 else (0,)
    first = x.dim() - len(kernel)
    shape = list(x.shape[:first])
    for d, size in enumerate(x.shape[first:]):
        step, pad = stride[d % len(stride)], padding[d % len(padding)]
        room = size + 2 * pad - dilation[d % len(dilation)] * (kernel[d] - 1) - 1
        steps = -(-room // step) if ceil else room // step
        if ceil and steps * step >= size + pad:  # the last window must begin inside the input
            steps -= 1
        shape.append(steps + 1)
    if min(shape) < 1:
        return None
    out = x.new_empty(shape)
    return (out, torch.empty_like(out, dtype=torch.int64)) if with_indices else out


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = parts[0]
    rank, dtype = first.dim(), first.dtype
    if not first.is_floating_point() or any(part.dim() != rank or part.dtype is not dtype for part in parts):
        return None
    dim %= rank
    before, after = first.shape[:dim], first.shape[dim + 1 :]
    if any(part.shape[:dim] != before or part.shape[dim + 1 :] != after for part in parts):
        return None
    joined = sum(part.shape[dim] for part in parts)
    return first.new_empty((*before, joined, *after))


_BY_NAME: dict[Shaped, str] = {
    _like_first: "relu gelu silu sigmoid hardswish hardsigmoid hardtanh leaky_relu elu mish tanh exp rsqrt sqrt neg "
    "log_sigmoid softplus erf sin cos clamp hardshrink square abs reciprocal",
    _itself: "relu_ silu_ hardswish_ hardsigmoid_ hardtanh_ leaky_relu_ elu_ mish_ sigmoid_ tanh_ clamp_ gelu_",
    _broadcast: "add mul sub div pow",
    _into: "add_ mul_ sub_ div_",
    _anew: "roll masked_fill",
    _reduction: "mean sum amax amin",
    _vector_norm: "linalg_vector_norm",
    _resized: "upsample_bilinear2d upsample_nearest2d upsample_bicubic2d upsample_nearest3d upsample_trilinear3d",
    _padded: "constant_pad_nd",
    _softmax: "_softmax _log_softmax _safe_softmax",
    _clone: "clone",
    _convolution: "convolution",
    _mm: "mm bmm",
    _addmm: "addmm baddbmm",
    _batch_norm: "native_batch_norm",
    _layer_norm: "native_layer_norm",
    _cat: "cat",
    partial(_pool, True, 4): "max_pool2d_with_indices max_pool3d_with_indices",
    partial(_pool, False, 3): "avg_pool2d avg_pool3d",
}
_SHAPED: dict[Any, Shaped] = {}
"""Operator -> its output in shape alone, for the operators that cost most of a run. All others are computed."""
for _shaped, _names in _BY_NAME.items():
    for _name in _names.split():
        _SHAPED[getattr(torch.ops.aten, _name)] = _of_floats(_shaped)
