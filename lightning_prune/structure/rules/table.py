"""The table of coupling rules, and the operator call that a rule receives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_prune.structure.labels import Cost, Label, Labels, Ledger
from lightning_prune.structure.traced_ints import numbers_in

__all__ = ["REDUCES", "RULES", "Call", "Dims", "Rule", "coupling_rule", "reduces", "rule_for", "tensors_among"]

Dims = dict[int, tuple[Label, ...]]
"""Dimension of an output -> its labels."""


class Call:
    """One call of one operator, as its rule sees it.

    Attributes:
        ledger: Records ties, pins and costs.
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its output.
        module: Path of the module that was running, and the module itself.
        lay: Attaches labels to a tensor other than the output.
        function: The Python function that called the operator, such as ``F.group_norm``, or None if unknown.
        given: The positional and the keyword arguments of that function.
        asked: The integers among those, flattened; computed on first use.
        positions_along: Labels of the dimension along which an integer output holds positions; they are pinned when an
            operator takes that output, or the model returns it.
    """

    def __init__(
        self,
        ledger: Ledger,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        labels: Callable[[Tensor], Labels],
        module: tuple[str, torch.nn.Module | None],
        arguments: Any,
        lay: Callable[[Tensor, Labels], None],
    ) -> None:
        """Store the parts of the call."""
        self.ledger = ledger
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.labels = labels
        self.module = module
        self.lay = lay
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = arguments[:2] if arguments else ((), {})
        self.function = arguments[2] if arguments else None
        self.positions_along: tuple[Label, ...] = ()

    @cached_property
    def asked(self) -> tuple[int, ...]:
        """Integers among the arguments of the Python function."""
        args, kwargs = self.given
        return tuple(numbers_in((args, tuple(kwargs.values()))))

    def python_argument(self, name: str, position: int) -> Any:
        """Return an argument of the Python function that called the operator, or None if it was not given."""
        args, kwargs = self.given
        if name in kwargs:
            return kwargs[name]
        return args[position] if position < len(args) else None

    def argument(self, name: str) -> Any:
        """Return an argument by its name in the operator's schema, or its default."""
        if name in self.kwargs:
            return self.kwargs[name]
        position, default = _positions(self.func)[name]
        return self.args[position] if position < len(self.args) else default

    def has(self, name: str) -> bool:
        """Return whether the operator's schema has an argument of this name."""
        return name in _positions(self.func)

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments, in order."""
        return tensors_among((*self.args, *self.kwargs.values()) if self.kwargs else self.args)

    def each_output(self, dims: Dims) -> Dims | list[Dims]:
        """Return the same labels for the output, or for every output."""
        return dims if isinstance(self.out, Tensor) else [dims] * len(self.out)

    def sizes(self, tensor: Tensor, *dims: int) -> list[int | tuple[Label, ...]]:
        """Return, for each dimension (all of them by default), its labels or else its fixed size."""
        labels, shape = self.labels(tensor), tensor.shape
        return [labels.at(dim % len(shape)) or shape[dim] for dim in dims or range(len(shape))]

    def cost(self, operator: str, factor: int, *sizes: int | tuple[Label, ...]) -> None:
        """Record multiply-adds: the product of a factor and of fixed and labelled sizes."""
        fixed = math.prod([size for size in sizes if isinstance(size, int)])
        labelled = tuple([size for size in sizes if not isinstance(size, int)])
        self.ledger.costs.append(Cost(operator, len(self.ledger.ran) - 1, factor * fixed, labelled))


Rule = Callable[[Call], "Dims | list[Dims]"]
"""From a call to the labels of its output (a list for several outputs); records ties and pins on the way."""

_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[Any, Rule] = {}
"""Operator (an overload or all overloads of a name) -> its rule."""

REDUCES: set[Any] = set()
"""Operators (as in RULES) that sum, contract or take a statistic over dimensions that may shrink."""


def coupling_rule(*operators: str, reduces: bool = False) -> Callable[[_Rule], _Rule]:
    """Register a function as the coupling rule of operators.

    The rule receives a :class:`Call`. It ties labels with ``call.ledger.tie``, pins them with ``call.ledger.pin`` and
    returns the labels of the output by dimension (a dimension left out has a fixed size). A wrong rule does no harm:
    the verification refuses its plans.

    Args:
        operators: Names as in ``torch.ops``: ``"aten.glu"``, ``"mylib.rotate"``. Names that this version of torch does
            not have are ignored.
        reduces: Whether an entry of the output depends on several entries along a dimension that may shrink (a sum,
            matrix product, norm or softmax), so that pruning some of them changes it.

    Examples:
        >>> @coupling_rule("mylib.scale_channels")
        ... def scale_channels(call):
        ...     x, gain = call.args  # (N, C, ...), (C,)
        ...     labels = call.labels(x)
        ...     channel = call.ledger.tie([labels.at(1), call.labels(gain).at(0)], "mylib.scale_channels")
        ...     return {**labels.dims, 1: channel}
    """

    def register(rule: _Rule) -> _Rule:
        for operator in operators:
            namespace, _, name = operator.partition(".")
            name, _, overload = name.partition(".")
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is None:
                continue
            func = getattr(packet, overload) if overload else packet
            RULES[func] = rule
            if reduces:
                REDUCES.add(func)
        return rule

    return register


def rule_for(func: Any) -> Rule | None:
    """Return the rule of an operator, or None if there is none."""
    return RULES.get(func) or RULES.get(func.overloadpacket)


def reduces(func: Any) -> bool:
    """Return whether an operator's rule declares a sum or statistic over dimensions that may shrink."""
    return func in REDUCES or func.overloadpacket in REDUCES


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in a nested sequence of arguments, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_among(value)
    return found


@cache
def _positions(func: Any) -> dict[str, tuple[int, Any]]:
    positions = {}
    for position, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        positions[argument.name] = (position, default)
    return positions
