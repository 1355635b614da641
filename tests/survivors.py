"""An oracle of every cut: it runs code at full width and carries, for every entry of every tensor, whether it survives.

It knows nothing of the library. Tensors keep their full sizes, so every number in the code keeps its first meaning:
heads, groups, pieces and slices are the original ones. Entries that were pruned are zero and are left out of every
statistic. What the slim model must compute is what is left when the pruned entries are dropped from the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MisfitError", "Survivors", "marked", "narrow_scales", "plain", "survivors_along"]


class MisfitError(Exception):
    """Tensors meet of which other entries survive: no slim model computes this."""


class Survivors(Tensor):
    """A tensor of full size, zero where it was pruned; ``alive`` says where it survives, a bool for every entry."""

    alive: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator's own rule, by its name."""
        name = func.__name__
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunctionSubclass():
            rule = RULES.get(name) or RULES.get(name.strip("_"))
            if rule is None:
                raise NotImplementedError(f"the oracle has no rule for {name}")
            return rule(func, *args, **(kwargs or {}))


def marked(value: Tensor, alive: Tensor | None = None) -> Survivors:
    """Return a tensor that carries which of its entries survive; all of them unless said otherwise."""
    with torch._C.DisableTorchFunctionSubclass():
        value = plain(value)
        alive = torch.ones(value.shape, dtype=torch.bool) if alive is None else alive.expand(value.shape)
        result = torch.where(alive, value, torch.zeros((), dtype=value.dtype)).as_subclass(Survivors)
    result.alive = alive
    return result


def plain(x: Any) -> Any:
    """Return the bare tensor, or what is not a tensor, as it is."""
    return x.as_subclass(Tensor) if isinstance(x, Survivors) else x


def alive_of(x: Any) -> Tensor | None:
    """Return where a tensor survives; constants that code made have no say."""
    return x.alive if isinstance(x, Survivors) else None


def survivors_along(x: Any, dim: int) -> int:
    """Count the entries that survive along a dimension."""
    if not isinstance(x, Survivors):
        return x.shape[dim]
    with torch._C.DisableTorchFunctionSubclass():
        return int(x.alive.sum(dim).max())


_narrow: list[bool] = [False]


@contextmanager
def narrow_scales(narrow: bool) -> Any:
    """Let attention without an explicit scale divide by the surviving width of a head, not by the original one."""
    _narrow.append(narrow)
    try:
        yield
    finally:
        _narrow.pop()


# Rules, by kind


def moved(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply what only moves entries to the entries and to their marks."""
    held = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Survivors)]
    if not held:
        return func(*args, **kwargs)
    values = func(*_mapped(plain, args), **{k: _mapped(plain, v) for k, v in kwargs.items()})
    marks = func(*_mapped(_as_number, args), **{k: _mapped(_as_number, v) for k, v in kwargs.items()})
    if isinstance(values, Tensor):
        return marked(values, marks > 0.5)
    return tuple(marked(value, mark > 0.5) for value, mark in zip(values, marks, strict=True))


def cast(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Any:
    value = func(plain(x), *_mapped(plain, args), **kwargs)
    return marked(value, x.alive) if isinstance(x, Survivors) else value


def taken(func: Callable[..., Any], x: Any, index: Any) -> Any:
    """Index; what indexes is a number, whatever it was made from."""
    index = _mapped(plain, index)
    return moved(func, x, index) if isinstance(x, Survivors) else func(x, index)


def constant(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what is no entry: sizes, types, or a new constant of the same size."""
    return func(plain(x), *_mapped(plain, args), **_mapped(plain, kwargs))


def decided(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Any:
    """Return numbers that code goes by."""
    if not x.alive.all():
        raise MisfitError(f"{func.__name__} looks at entries that were pruned")
    return func(plain(x), *_mapped(plain, args), **kwargs)


def pointwise(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Survivors:
    values = func(*_mapped(plain, args), **{k: _mapped(plain, v) for k, v in kwargs.items()})
    return marked(values, meet(values.shape, [*args, *kwargs.values()]))


def meet(shape: Sequence[int], args: Iterable[Any]) -> Tensor:
    """Return where all of the tensors survive; they must survive at the same places."""
    held = [a.alive for a in args if isinstance(a, Survivors)]
    both = torch.ones(tuple(shape), dtype=torch.bool)
    for alive in held:
        both = both & alive
    for alive in held if both.numel() else ():
        mine = both.reshape((1,) * (both.dim() - alive.dim()) + tuple(both.shape)) if alive.dim() > both.dim() else both
        back = mine
        for _ in range(back.dim() - alive.dim()):
            back = back.any(0)
        for dim, size in enumerate(alive.shape):
            if size == 1 and back.shape[dim] != 1:
                back = back.any(dim, keepdim=True)
        if not torch.equal(back, alive):
            raise MisfitError(
                f"tensors of which {int(alive.sum())} and {int(back.sum())} entries survive meet one by one"
            )
    return both


def reduced(fill: float | None) -> Callable[..., Any]:
    """Make the rule of a reduction that is right once pruned entries hold ``fill``."""

    def rule(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Any:
        value = plain(x) if fill is None else torch.where(x.alive, plain(x), torch.full((), fill, dtype=x.dtype))
        value = func(value, *args, **kwargs)
        return marked(value, _any(x.alive, _dims(args, kwargs), _keepdim(args, kwargs)))

    return rule


def extreme(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Any:
    """``max`` and ``min``, over everything, along a dimension, or of two tensors."""
    if args and isinstance(args[0], Tensor):
        return pointwise(func, x, *args)
    fill = -math.inf if "max" in func.__name__ else math.inf
    value = func(torch.where(x.alive, plain(x), torch.full((), fill, dtype=x.dtype)), *args, **kwargs)
    if isinstance(value, Tensor):
        return marked(value, x.alive.any())
    alive = _any(x.alive, _dims(args, kwargs), _keepdim(args, kwargs))
    return type(value)((marked(value[0], alive), value[1]))


def chosen(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Any:
    """``argmax`` and the like: places among entries some of which are gone have another meaning."""
    dims = _dims(args, kwargs)
    alive = _any(x.alive, dims, _keepdim(args, kwargs))
    if not torch.equal(alive, _all(x.alive, dims, _keepdim(args, kwargs))):
        raise MisfitError(f"{func.__name__} over entries some of which were pruned")
    return marked(func(plain(x), *args, **kwargs), alive)


def mean(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    dims, keep = _dims(args, kwargs), _keepdim(args, kwargs)
    count = _sum(x.alive.to(plain(x).dtype), dims, keep)
    return marked(_sum(plain(x), dims, keep) / count.clamp(min=1), count > 0)


def variance(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    unbiased = kwargs.get("unbiased", kwargs.get("correction", 1))
    dims, keep = _dims(args, kwargs), _keepdim(args, kwargs)
    count = _sum(x.alive.to(plain(x).dtype), dims, True)
    centre = _sum(plain(x), dims, True) / count.clamp(min=1)
    squares = torch.where(x.alive, (plain(x) - centre).square(), torch.zeros((), dtype=x.dtype))
    total = _sum(squares, dims, keep)
    count = _sum(x.alive.to(plain(x).dtype), dims, keep)
    result = total / (count - float(unbiased))
    return marked(result.sqrt() if func.__name__ == "std" else result, count > 0)


def softmax(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    return marked(
        func(torch.where(x.alive, plain(x), torch.full((), -math.inf, dtype=x.dtype)), *args, **kwargs), x.alive
    )


def running(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    return marked(func(plain(x), *args, **kwargs), x.alive)


def variance_and_mean(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> tuple[Survivors, Survivors]:
    without = {name: value for name, value in kwargs.items() if name not in ("unbiased", "correction")}
    return variance(torch.var, x, *args, **kwargs), mean(torch.mean, x, *args, **without)


def weight_norm(func: Callable[..., Any], v: Any, g: Any, dim: int = 0) -> Survivors:
    """Rows of length ``g``: entries that were pruned add nothing to the length of a row."""
    rest = tuple([other for other in range(v.dim()) if other != dim])
    length = plain(v).square().sum(rest, keepdim=True).sqrt()
    return marked(plain(v) * plain(g) / torch.where(length == 0, torch.ones_like(length), length), v.alive)


def layer_norm(
    func: Callable[..., Any], x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Survivors:
    dims = tuple(range(-len(tuple(shape)), 0))
    return _affine(_normed(x, dims, eps), weight, bias)


def rms_norm(
    func: Callable[..., Any], x: Survivors, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Survivors:
    dims = tuple(range(-len(tuple(shape)), 0))
    count = x.alive.to(x.dtype).sum(dims, keepdim=True)
    power = plain(x).square().sum(dims, keepdim=True) / count.clamp(min=1)
    result = plain(x) * (power + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _affine(marked(result, x.alive), weight, None)


def group_norm(
    func: Callable[..., Any], x: Survivors, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Survivors:
    pieces = plain(x).reshape(x.shape[0], groups, -1)
    alive = x.alive.reshape(pieces.shape)
    normed = _normed(marked(pieces, alive), (-1,), eps)
    result = marked(plain(normed).reshape(x.shape), x.alive)
    columns = (-1,) + (1,) * (x.dim() - 2)
    return _affine(result, *(moved(Tensor.view, t, columns) if t is not None else None for t in (weight, bias)))


def batch_norm(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    """Every channel has its own numbers; all that belong to a channel must survive with it."""
    channels = x.alive.movedim(1, 0).flatten(1).any(1)
    for other in [a for a in (*args, *kwargs.values()) if isinstance(a, Survivors)]:
        if not torch.equal(other.alive, channels):
            raise MisfitError("a normalisation's numbers survive for other channels than its input")
    values = func(plain(x), *[_copied(a) for a in args], **{k: _copied(v) for k, v in kwargs.items()})
    return marked(values, x.alive)


def bilinear(func: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Survivors:
    """Multiply and sum: what is summed over must survive on both sides alike."""
    value = func(plain(a), plain(b))
    numbers = [_as_number(t) if isinstance(t, Survivors) else None for t in (a, b)]
    full = [torch.ones(t.shape, dtype=torch.float64) for t in (a, b)]
    one, two = (full[i] if numbers[i] is None else numbers[i] for i in range(2))
    left, right, both = func(one, full[1]), func(full[0], two), func(one, two)
    alive = (left > 0.5) & (right > 0.5)
    if all(n is not None for n in numbers) and not (
        torch.equal(left[alive], both[alive]) and torch.equal(right[alive], both[alive])
    ):
        raise MisfitError(f"{func.__name__} sums over entries of which other ones survive on either side")
    return marked(value, alive)


def matmul(func: Callable[..., Any], a: Any, b: Any) -> Survivors:
    return bilinear(torch.matmul, a, b)


def rmatmul(func: Callable[..., Any], a: Any, b: Any) -> Survivors:
    return bilinear(torch.matmul, b, a)


def einsum(func: Callable[..., Any], equation: str, a: Any, b: Any) -> Survivors:
    def product(one: Tensor, two: Tensor) -> Tensor:
        return torch.einsum(equation, one, two)

    return bilinear(product, a, b)


def linear(func: Callable[..., Any], x: Any, weight: Any, bias: Any = None) -> Survivors:
    result = bilinear(F.linear, x, weight)
    return result if bias is None else pointwise(torch.add, result, bias)


def convolution(
    func: Callable[..., Any], x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Survivors:
    def run(one: Tensor, two: Tensor) -> Tensor:
        return func(one, two, None, *args, **kwargs)

    result = bilinear(run, x, weight)
    if bias is None:
        return result
    return pointwise(torch.add, result, moved(Tensor.view, bias, (-1,) + (1,) * (result.dim() - 2)))


def attention(
    func: Callable[..., Any], q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Survivors:  # fmt: skip
    if scale is None:
        scale = (survivors_along(q, -1) if _narrow[-1] else q.shape[-1]) ** -0.5
    if enable_gqa:
        k, v = (moved(torch.repeat_interleave, t, q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    scores = bilinear(torch.matmul, q, moved(Tensor.mT.__get__, k))
    scores = marked(plain(scores) * scale, scores.alive)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = marked(plain(scores).masked_fill(later, -math.inf), scores.alive)
    if attn_mask is not None:
        scores = pointwise(torch.add, scores, attn_mask)
    return bilinear(torch.matmul, softmax(torch.softmax, scores, -1), v)


def embedding(func: Callable[..., Any], index: Any, weight: Any, *args: Any, **kwargs: Any) -> Survivors:
    return moved(lambda w: w[plain(index)], weight)


def spatial(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    """Pooling and resizing: channels keep to themselves and survive at all positions or at none."""
    value = func(plain(x), *args, **kwargs)
    return marked(value, _channels(x, value))


def unfolded(func: Callable[..., Any], x: Survivors, *args: Any, **kwargs: Any) -> Survivors:
    value = func(plain(x), *args, **kwargs)
    channels = x.alive.flatten(2).any(2)
    return marked(value, channels.repeat_interleave(value.shape[1] // x.shape[1], 1)[:, :, None])


def padded(
    func: Callable[..., Any], x: Survivors, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Any:
    """Pad; what pads always stays."""
    entries = func(plain(x), pad, mode, value)
    if mode == "constant":
        return marked(entries, func(x.alive.to(torch.float64), pad, mode, 1.0) > 0.5)
    return marked(entries, func(x.alive.to(torch.float64), pad, mode) > 0.5)


def put(func: Callable[..., Any], x: Survivors, index: Any, values: Any, *args: Any) -> Survivors:
    places = tuple(plain(i) for i in index)
    value = func(plain(x), places, plain(values), *args)
    marks = values.alive if isinstance(values, Survivors) else torch.ones(values.shape, dtype=torch.bool)
    alive = torch.index_put(x.alive, places, marks)
    if not torch.equal(alive, x.alive):
        raise MisfitError("entries are written over others that survive elsewhere")
    return marked(value, x.alive)


def paired(func: Callable[..., Any], x: Survivors) -> Survivors:
    """``view_as_complex``: both halves of a complex number survive, or none."""
    if not torch.equal(x.alive[..., 0], x.alive[..., 1]):
        raise MisfitError("half of a complex number was pruned")
    return marked(func(plain(x).contiguous()), x.alive[..., 0])


def parted(func: Callable[..., Any], x: Survivors) -> Survivors:
    return marked(func(plain(x)), x.alive[..., None].expand(*x.shape, 2))


def same(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


# What the rules stand on


def _as_number(x: Any) -> Any:
    """Return the marks of a tensor as numbers, which every operator that moves entries takes."""
    if isinstance(x, Survivors):
        return x.alive.to(torch.float64)
    return torch.ones(x.shape, dtype=torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    for a in args:
        if isinstance(a, (tuple, list)):
            yield from _flat(a)
        else:
            yield a


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(_mapped(function, item) for item in x)
    if isinstance(x, dict):
        return {key: _mapped(function, item) for key, item in x.items()}
    return function(x)


def _copied(x: Any) -> Any:
    return plain(x).clone() if isinstance(x, Tensor) else x


def _dims(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    dims = kwargs.get("dim", args[0] if args else None)
    return None if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)


def _keepdim(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("keepdim", args[1] if len(args) > 1 else False))


def _sum(x: Tensor, dims: tuple[int, ...] | None, keepdim: bool) -> Tensor:
    return x.sum() if dims is None else x.sum(dims, keepdim=keepdim)


def _any(alive: Tensor, dims: tuple[int, ...] | None, keepdim: bool) -> Tensor:
    return _sum(alive.to(torch.int64), dims, keepdim) > 0


def _all(alive: Tensor, dims: tuple[int, ...] | None, keepdim: bool) -> Tensor:
    return _sum((~alive).to(torch.int64), dims, keepdim) == 0


def _normed(x: Survivors, dims: tuple[int, ...], eps: float) -> Survivors:
    count = x.alive.to(x.dtype).sum(dims, keepdim=True).clamp(min=1)
    centred = torch.where(x.alive, plain(x) - plain(x).sum(dims, keepdim=True) / count, torch.zeros((), dtype=x.dtype))
    return marked(centred * (centred.square().sum(dims, keepdim=True) / count + eps).rsqrt(), x.alive)


def _affine(x: Survivors, weight: Any, bias: Any) -> Survivors:
    x = x if weight is None else pointwise(torch.mul, x, weight)
    return x if bias is None else pointwise(torch.add, x, bias)


def _channels(x: Survivors, value: Tensor) -> Tensor:
    channels = x.alive.flatten(2)
    if not torch.equal(channels.any(2), channels.all(2)):
        raise MisfitError("a channel survives at some positions only")
    return channels.any(2).reshape(*channels.shape[:2], *(1,) * (value.dim() - 2))


_KINDS: dict[Callable[..., Any], str] = {
    moved: """view reshape flatten unflatten permute transpose movedim squeeze unsqueeze expand expand_as view_as
        repeat repeat_interleave chunk split split_with_sizes tensor_split narrow unbind roll flip
        contiguous clone detach index_select t T mT swapaxes stack cat concat pixel_shuffle pixel_unshuffle
        channel_shuffle tile select""",
    taken: "getitem",
    cast: "to float double bfloat16 type type_as",
    constant: """shape size dim ndim dtype device numel len stride is_contiguous layout requires_grad
        is_floating_point is_complex zeros_like ones_like new_zeros new_ones new_tensor new_full new_empty
        element_size""",
    decided: "item bool any all nonzero tolist int",
    pointwise: """add sub mul div true_divide radd rsub rmul rtruediv truediv pow rpow neg relu gelu silu sigmoid tanh
        exp log sqrt rsqrt square abs softplus elu leaky_relu hardswish clamp clamp_min maximum minimum gt
        lt ge le eq ne where lerp prelu mish reciprocal logical_not invert masked_fill addcmul sin cos
        nan_to_num sign""",
    reduced(None): "sum linalg_vector_norm",
    reduced(-math.inf): "amax logsumexp",
    reduced(math.inf): "amin",
    extreme: "max min",
    chosen: "argmax argmin",
    mean: "mean",
    variance: "var std",
    variance_and_mean: "var_mean",
    weight_norm: "_weight_norm",
    softmax: "softmax log_softmax",
    running: "cumsum normalize",
    layer_norm: "layer_norm",
    rms_norm: "rms_norm",
    group_norm: "group_norm",
    batch_norm: "batch_norm instance_norm",
    matmul: "matmul bmm mm",
    rmatmul: "rmatmul",
    einsum: "einsum",
    linear: "linear",
    convolution: "conv1d conv2d conv_transpose2d",
    attention: "scaled_dot_product_attention",
    embedding: "embedding",
    spatial: """max_pool2d max_pool1d avg_pool2d adaptive_avg_pool2d adaptive_avg_pool1d interpolate fft_rfft2
        fft_irfft2 boolean_dispatch""",
    unfolded: "unfold",
    padded: "pad",
    put: "index_put",
    paired: "view_as_complex",
    parted: "view_as_real",
    same: "requires_grad_",
}
RULES: dict[str, Callable[..., Any]] = {name: rule for rule, names in _KINDS.items() for name in names.split()}


def vector_norm(
    func: Callable[..., Any], x: Survivors, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    """``norm``: pruned entries are zero and add nothing."""
    return marked(func(plain(x), p, dim, keepdim), _any(x.alive, _dims((dim,), {}), keepdim))


RULES["norm"] = vector_norm


def assigned(func: Callable[..., Any], x: Survivors, index: Any, value: Any) -> None:
    """Write into a part: what is written survives as it did, and numbers where there were entries."""
    index = _mapped(plain, index)
    entries, alive = plain(x), x.alive.clone()
    entries[index] = plain(value)
    if isinstance(value, Survivors):
        alive[index] = value.alive.expand(alive[index].shape)
    elif isinstance(value, Tensor):
        alive[index] = True
    entries[~alive] = 0
    x.alive = alive


RULES["__setitem__"] = assigned
