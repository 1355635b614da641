"""Counts the multiply-adds of a model on example inputs; knows nothing of what may leave it."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.model.calls import ExampleInputs, as_call, called, tensors_in
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure.rules import is_pointwise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts a function as it is imported; torch calls that deprecated.
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import conv_flop_count, elementwise_flop_counter, get_shape

__all__ = ["BY_FVCORE", "BY_TRACE", "FlopCount", "UntraceableError", "count_flops", "may_multiply"]


BY_FVCORE, BY_TRACE = "by fvcore", "from the label trace"


class UntraceableError(PruningError):
    """A model runs, and ``torch.jit`` cannot trace it; ``reason`` is why."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class FlopCount:
    """The multiply-adds of one call of a model.

    A multiply-add counts once, as in fvcore. Masks do not lower the count, removing units does.

    Attributes:
        total: Multiply-adds of the whole model.
        by_module: Multiply-adds of each module and everything below it, under the module's path; ``""`` is the model.
            A module used in several places is listed once, under its first path.
        by_operator: Multiply-adds of each operator.
        uncounted: Number of calls of each operator that may multiply but has no rule; ``total`` is without them.
        counted: By what, in words.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    uncounted: dict[str, int]
    counted: str = BY_FVCORE


def count_flops(model: nn.Module, example_inputs: ExampleInputs) -> FlopCount:
    """Count the multiply-adds of one call of the model, in eval mode and without gradients.

    The model runs once, on its own device: the cost is one forward pass and about half a millisecond for each operator.
    Parameters, buffers, modes, hooks, random state and inputs are left as found; the user's hooks are called.
    An operator counts only if a tensor that the model returns depends on it.

    Args:
        model: Any module that runs.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        PruningError: If the model fails on the inputs, returns no tensor or cannot be traced by ``torch.jit``. Pruning
            does not need that: it then counts by its own trace.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10))
        >>> flops = count_flops(model, torch.ones(1, 3, 4, 4))
        >>> flops.total  # 3 * 8 * 3 * 3 * 2 * 2 + 32 * 10
        1184
        >>> flops.by_module
        {'': 1184, '0': 864, '1': 0, '2': 320}
    """
    with undisturbed(model, example_inputs, copied=True), _unfused():
        _call_eagerly_(model)
        leaves, spec = pytree.tree_flatten(_copied(example_inputs))
        analysis = FlopCountAnalysis(
            _Traceable(partial(called(example_inputs), model), model, leaves, spec),
            tuple(filter(torch.is_tensor, leaves)),
        )
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle(**_RULES)
        try:
            by_module = analysis.by_module()
        except Exception as error:
            _refuse(model, example_inputs, error)
    return FlopCount(
        total=int(analysis.total()),
        by_module={_own_path(name): int(flops) for name, flops in by_module.items()},
        by_operator={name: int(flops) for name, flops in analysis.by_operator().items()},
        uncounted={kind: calls for kind, calls in analysis.unsupported_ops().items() if may_multiply(kind)},
    )


class _Traceable(nn.Module):
    """The model seen as ``torch.jit`` wants it: from the tensors among its inputs to the tensors among its outputs."""

    def __init__(self, call: Callable[..., Any], model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.call = call
        self.model = model
        self.leaves = leaves
        self.spec = spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec
        )
        outputs = tuple(tensors_in(self.call(*args, **kwargs)))
        if not outputs:
            raise ValueError("it returned no tensor that a trace could end in")
        return outputs

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> dict[str, Any]:
        # The trace asks here for what is no constant. A model's own state_dict may leave tensors out or hold others.
        destination.update({prefix + name: tensor for name, tensor in self.named_parameters()})
        destination.update({prefix + name: tensor for name, tensor in self.named_buffers()})
        return destination


def _own_path(name: str) -> str:
    """Name a module as the model itself names it, not as :class:`_Traceable` does."""
    return name.removeprefix("model").removeprefix(".")


@contextmanager
def _unfused() -> Iterator[None]:
    """Make attention modules call their linear layers one by one; their fused kernel tells no shapes."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _call_eagerly_(model: nn.Module) -> None:
    """Make modules that were compiled call what they were compiled from; :func:`undisturbed` takes this back."""
    for module in model.modules():
        if "dynamo_ctx" in vars(module):  # torch.compile(module) was here; to ask for its class would import dynamo.
            vars(module)["forward"] = module._modules["_orig_mod"]
        if vars(module).get("_compiled_call_impl") is not None:  # module.compile() was here.
            vars(module)["_compiled_call_impl"] = None


def _copied(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the tensors among the inputs, for models that write on them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), as_call(example_inputs))


def _refuse(model: nn.Module, example_inputs: ExampleInputs, error: Exception) -> NoReturn:
    """Raise for a model that could not be counted: it fails on the inputs, or runs but cannot be traced."""
    args, kwargs = _copied(example_inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            called(example_inputs)(model, *args, **kwargs)
    except Exception as failure:
        raise PruningError(
            f"count_flops: {type(model).__name__} fails on the example inputs: {type(failure).__name__}: {failure}. "
            "They must be what its forward takes in eval mode: a tensor, a tuple of positional inputs or a dict of "
            "keyword inputs. Pass other example inputs."
        ) from failure
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    raise UntraceableError(
        f"count_flops: {type(model).__name__} runs on the example inputs, but torch.jit cannot trace it: {reason}. The "
        "trace takes no torch.jit.script modules, reentrant checkpoints, flex_attention, numpy on sizes or slashes in "
        "module names. Leave them out in eval mode. Pruning counts such models from its own trace.",
        reason,
    ) from error


# From here on: what one operator costs. An operator's inputs and outputs are values of the traced graph.

_Values = list[Any]


def _contraction(left: int, dim: int = -1) -> Callable[[_Values, _Values], int]:
    """Count an operator whose every output entry is a sum over dimension ``dim`` of its input number ``left``."""

    def multiply_adds(inputs: _Values, outputs: _Values) -> int:
        return math.prod(get_shape(outputs[0])) * get_shape(inputs[left])[dim]

    return multiply_adds


def _grouped_mm(inputs: _Values, outputs: _Values) -> int:
    # Each row of the first input is multiplied with one of the matrices.
    return math.prod(get_shape(inputs[0])) * get_shape(inputs[1])[-1]


def _addbmm(inputs: _Values, outputs: _Values) -> int:
    return math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]


def _tensordot(inputs: _Values, outputs: _Values) -> int:
    # Both inputs hold each contracted dimension once, the output holds none of them.
    both = math.prod(get_shape(inputs[0])) * math.prod(get_shape(inputs[1]))
    result = math.prod(get_shape(outputs[0]))
    return result * math.isqrt(both // max(result, 1))


def _einsum(inputs: _Values, outputs: _Values) -> int:
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    path = [value.toIValue() for value in inputs[2].node().inputs()]
    return einsum_multiply_adds(inputs[0].toIValue(), shapes, path)


def einsum_multiply_adds(equation: str, shapes: list[list[int]], path: list[int] | None = None) -> int:
    """Count the multiply-adds of an einsum, contracted two operands at a time.

    Args:
        equation: As for :func:`torch.einsum`.
        shapes: The shape of each operand.
        path: Positions of the two operands of each step, flat; the result goes last. By default from left to right.

    Examples:
        >>> einsum_multiply_adds("bij, bjk -> bik", [[2, 3, 4], [2, 4, 5]])  # 2 * 3 * 4 * 5
        120
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = [_sizes(term, shape) for term, shape in zip(left.split(","), shapes, strict=True)]
    # Without an arrow the output holds what the dots stand for and the letters that occur once.
    result = set(right) if arrow else {letter for letter in left if left.count(letter) == 1}
    if "..." in right or not arrow:
        result |= {label for sizes in operands for label in sizes if label.startswith("-")}
    total = 0
    for step in range(len(operands) - 1):
        first, second = sorted(path[2 * step : 2 * step + 2] if path else (0, 1))
        b, a = operands.pop(second), operands.pop(first)
        needed = result.union(*operands)  # by the output, or by a later step
        shared = a.keys() & b.keys()
        sizes = {}
        for label in a.keys() | b.keys():
            if label in needed or label in shared:  # else its own operand is summed over it before
                sizes[label] = max(a.get(label, 1), b.get(label, 1))
        summed = sizes.keys() - needed
        if summed:  # else it is a pointwise multiplication, which counts no more than any other
            total += math.prod(sizes.values())
        left_over = {label: size for label, size in sizes.items() if label not in summed}
        operands.insert(len(operands) if path else 0, left_over)
    return total


def _sizes(term: str, shape: list[int]) -> dict[str, int]:
    """Map the letters of one einsum operand to sizes; what dots stand for is numbered from the right: -1, -2, ..."""
    before, dots, after = term.partition("...")
    hidden = [str(-n) for n in range(len(shape) - len(before) - len(after), 0, -1)] if dots else []
    return dict(zip([*before, *hidden, *after], shape, strict=True))


def _convolution(inputs: _Values, outputs: _Values) -> Counter[str]:
    x, weight, out = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
    return Counter(conv=conv_flop_count([1] * (len(weight) - len(x)) + x, weight, [1] * (len(weight) - len(out)) + out))


def _conv_tbc(inputs: _Values, outputs: _Values) -> int:
    taps, in_channels, _ = get_shape(inputs[1])
    return math.prod(get_shape(outputs[0])) * taps * in_channels


def _deform_conv2d(inputs: _Values, outputs: _Values) -> int:
    return math.prod(get_shape(outputs[0])) * math.prod(get_shape(inputs[1])[1:])


def _attention(inputs: _Values, outputs: _Values) -> int:
    key, value, out = get_shape(inputs[1]), get_shape(inputs[2]), get_shape(outputs[0])
    # [..., S, E], [..., S, Ev], [..., L, Ev]; the heads of the output are those of the query.
    return math.prod(out[:-1]) * key[-2] * (key[-1] + value[-1])


def _recurrent(inputs: _Values, outputs: _Values) -> int:
    # The last list of tensors holds the weights of all layers and directions; each matrix is used once at each step of
    # each sequence. The first input is [T, B, I], [B, T, I], [T, I], or packed: [sum of lengths, I].
    weights = [value for value in inputs if value.node().kind() == "prim::ListConstruct"][-1]
    shapes = [get_shape(value) for value in weights.node().inputs()]
    return math.prod(get_shape(inputs[0])[:-1]) * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _bilinear(inputs: _Values, outputs: _Values) -> int:
    positions = math.prod(get_shape(inputs[0])[:-1])
    out_features, in1, in2 = get_shape(inputs[2])
    return positions * out_features * (in1 * in2 + in2)  # x1 @ W, then its inner product with x2.


def _normalisation(weight: int, plain: int, affine: int) -> Callable[[_Values, _Values], int]:
    """Count so many multiply-adds per entry, with and without the weight that is input number ``weight``."""

    def multiply_adds(inputs: _Values, outputs: _Values) -> int:
        return math.prod(get_shape(inputs[0])) * (plain if get_shape(inputs[weight]) is None else affine)

    return multiply_adds


_RULES: dict[str, Callable[[_Values, _Values], int | float | Counter[str]]] = {
    # fvcore's own rules refuse vectors, and miss a second operand with more batch dimensions than the first.
    "aten::matmul": _contraction(0),
    "aten::linear": _contraction(0),
    "aten::mv": _contraction(0),
    "aten::dot": _contraction(0),
    "aten::vdot": _contraction(0),
    "aten::inner": _contraction(0),
    "aten::addmv": _contraction(1),
    "aten::baddbmm": _contraction(1),
    "aten::_grouped_mm": _grouped_mm,
    "aten::linalg_matmul": _contraction(0),
    "aten::baddbmm_": _contraction(1),
    "aten::addbmm": _addbmm,
    "aten::tensordot": _tensordot,
    "aten::cdist": _contraction(0),
    # fvcore rounds the FLOPs of an einsum to four digits.
    "aten::einsum": _einsum,
    "aten::bilinear": _bilinear,
    "aten::_convolution_mode": _convolution,
    "aten::conv_tbc": _conv_tbc,
    "torchvision::deform_conv2d": _deform_conv2d,
    "aten::scaled_dot_product_attention": _attention,
    **dict.fromkeys(["aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"], _recurrent),
    # fvcore's figures, for tensors of any number of dimensions. RMS norm saves the mean and its subtraction.
    "aten::layer_norm": _normalisation(weight=2, plain=4, affine=5),
    "aten::group_norm": _normalisation(weight=2, plain=4, affine=5),
    "aten::instance_norm": _normalisation(weight=1, plain=4, affine=5),
    "aten::rms_norm": _normalisation(weight=2, plain=2, affine=3),
    # fvcore knows the nearest and the bilinear one: as many per output entry as there are neighbours.
    "aten::upsample_linear1d": elementwise_flop_counter(0, 2),
    "aten::upsample_trilinear3d": elementwise_flop_counter(0, 8),
    "aten::upsample_bicubic2d": elementwise_flop_counter(0, 16),
}
"""What fvcore has no rule for, or a wrong one."""

_MOVEMENT = """
    affine_grid_generator alpha_dropout arange argsort bernoulli bitwise_not block_diag broadcast_tensors bucketize
    cartesian_prod cat channel_shuffle col2im complex constant_pad_nd copy detach diag diag_embed dropout embedding
    empty empty_like empty_strided exponential eye feature_alpha_dropout feature_dropout fill flip floor_divide full
    full_like gather hann_window hstack im2col index index_add index_copy index_fill index_put index_select lift_fresh
    linspace _local_scalar_dense logspace masked_fill masked_scatter masked_select meshgrid new_empty new_full
    new_ones new_zeros nonzero normal numpy_T one_hot ones ones_like _pack_padded_sequence pad _pad_packed_sequence
    pin_memory pixel_shuffle pixel_unshuffle polar rand rand_like randint randn randn_like random randperm
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d _reshape_alias resize _resize_output roll scalar_tensor scatter scatter_add scatter_reduce
    searchsorted set sort stack take take_along_dim tile _to_copy topk tril tril_indices triu triu_indices uniform
    _unique2 unique_consecutive unique_dim unsafe_chunk _unsafe_index unsafe_split unsafe_split_with_sizes
    _unsafe_view vstack where zero zeros zeros_like
"""
_REDUCTIONS = """
    all amax amin aminmax any argmax argmin bincount count_nonzero cummax cummin cumprod cumsum diff frobenius_norm
    histc kthvalue linalg_norm linalg_vector_norm logcumsumexp logsumexp max mean median min mode nanmean nanquantile
    nansum norm prod quantile std std_mean sum sum_to_size trapezoid var var_mean
"""
_POOLING_ACTIVATIONS_LOSSES = """
    adaptive_avg_pool1d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d
    avg_pool2d avg_pool3d binary_cross_entropy binary_cross_entropy_with_logits cosine_similarity cross
    cross_entropy_loss fractional_max_pool2d fractional_max_pool3d glu hardshrink hardswish huber_loss kl_div kron
    l1_loss linalg_cross log_sigmoid _log_softmax log_softmax max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d mse_loss multinomial
    native_dropout nll_loss nll_loss2d nll_loss_nd outer pairwise_distance prelu _prelu_kernel relu6 rrelu
    _safe_softmax selu smooth_l1_loss softmax _softmax softplus softshrink triplet_margin_loss upsample_nearest1d
    upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
    _weight_norm_interface
"""
_FREE = frozenset(f"{_MOVEMENT} {_REDUCTIONS} {_POOLING_ACTIVATIONS_LOSSES}".split())
"""Operators of aten that fvcore's convention leaves out and whose schema does not show it."""


def may_multiply(kind: str) -> bool:
    """Return whether an operator without a rule may carry multiply-adds; what is not known to carry none may."""
    namespace, _, name = kind.partition("::")
    operator = getattr(torch.ops.aten, name.removesuffix("_"), None) or getattr(torch.ops.aten, name, None)
    if namespace != "aten" or operator is None:
        return True
    if operator.__name__ in _FREE:
        return False
    returns_a_tensor = False
    for name in operator.overloads():
        overload = getattr(operator, name)
        if is_pointwise(overload):
            return False
        for value in overload._schema.returns:
            if value.alias_info is not None and not value.alias_info.is_write:  # a view
                return False
            returns_a_tensor = returns_a_tensor or "Tensor" in str(value.type)
    return returns_a_tensor
