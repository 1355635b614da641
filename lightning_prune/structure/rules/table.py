"""The one table of coupling rules, and what a rule gets to see; knows no single operator."""

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
"""Dimension of an output -> the labels along it."""


class Call:
    """One call of one operator, as its rule sees it.

    Attributes:
        ledger: Where meetings are written down.
        func: The operator.
        args: Its positional arguments, as they were given.
        kwargs: Its keyword arguments, as they were given.
        out: What it returned.
        module: Path of the module that was running, and the module itself.
        lay: Gives labels to another tensor than the output.
        function: The Python function that called it, ``F.group_norm`` say, or None where that is not known.
        given: The positional and the keyword arguments of that function, as they were given.
        asked: The whole numbers among those, flattened; worked out when a rule first looks.
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
        """Bundle what one call consists of."""
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

    @cached_property
    def asked(self) -> tuple[int, ...]:
        """Return the whole numbers that Python asked for."""
        args, kwargs = self.given
        return tuple(numbers_in((args, tuple(kwargs.values()))))

    def python_argument(self, name: str, position: int) -> Any:
        """Return an argument of the Python function that called the operator, or None where it was not given."""
        args, kwargs = self.given
        if name in kwargs:
            return kwargs[name]
        return args[position] if position < len(args) else None

    def argument(self, name: str) -> Any:
        """Return an argument by the name it has in the operator's schema, or its default."""
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

    def sizes(self, tensor: Tensor, *dims: int) -> list[int | tuple[Label, ...]]:
        """Return, for each dimension (all of them by default), its labels or else its fixed size."""
        labels, shape = self.labels(tensor), tensor.shape
        return [labels.at(dim % len(shape)) or shape[dim] for dim in dims or range(len(shape))]

    def cost(self, operator: str, factor: int, *sizes: int | tuple[Label, ...]) -> None:
        """Write down multiply-adds: the product of a factor and of fixed and labelled sizes."""
        fixed = math.prod([size for size in sizes if isinstance(size, int)])
        labelled = tuple([size for size in sizes if not isinstance(size, int)])
        self.ledger.costs.append(Cost(operator, len(self.ledger.ran) - 1, factor * fixed, labelled))


Rule = Callable[[Call], "Dims | list[Dims]"]
"""Given a call, writes down what meets and returns the labels of the output (a list for several outputs)."""

_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[Any, Rule] = {}
"""Operator (an overload or all overloads of a name) -> its rule."""

REDUCES: set[Any] = set()
"""Operators (as in RULES) whose outputs sum, contract or take a statistic over dimensions that may shrink."""


def coupling_rule(*operators: str, reduces: bool = False) -> Callable[[_Rule], _Rule]:
    """Teach the trace how an operator passes labels on.

    The rule gets a :class:`Call`; it lets labels meet with ``call.ledger.tie``, pins with ``call.ledger.pin`` and
    returns the labels of the output, dimension by dimension (a dimension left out has a fixed size). Whatever a rule
    says, no cut is made that the proof does not confirm.

    Args:
        operators: Names as in ``torch.ops``: ``"aten.glu"``, ``"mylib.rotate"``. Names this torch does not have are
            passed over.
        reduces: Whether an entry of the output depends on several entries along a dimension that may shrink (a sum, a
            product of matrices, a norm, a softmax), so that what is left of it changes when some of them leave.

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
            if packet is not None:
                RULES[getattr(packet, overload) if overload else packet] = rule
                if reduces:
                    REDUCES.add(getattr(packet, overload) if overload else packet)
        return rule

    return register


def rule_for(func: Any) -> Rule | None:
    """Return the rule of an operator, or None where nobody taught one."""
    return RULES.get(func) or RULES.get(func.overloadpacket)


def reduces(func: Any) -> bool:
    """Return whether the rule of an operator says that it sums or takes a statistic over labelled dimensions."""
    return func in REDUCES or func.overloadpacket in REDUCES


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in a flat or nested sequence of arguments."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_among(value)
    return found


@cache
def _positions(func: Any) -> dict[str, tuple[int, Any]]:
    arguments = func._schema.arguments
    return {a.name: (i, a.default_value if a.has_default_value() else None) for i, a in enumerate(arguments)}
