"""Reads amounts: fractions, and whole numbers of units, weights or layers; looks at no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_prune.model.errors import PruningError

__all__ = [
    "Amount", "check_amount", "check_count", "check_single", "fraction_of", "in_fractions", "is_count", "is_number",
    "quoted",
]  # fmt: skip

Amount = float | Mapping[Any, float]
"""A fraction in [0, 1) or a whole number from 1 (an int), or either by pattern of module paths or by module."""

_MOST = 3  # layers that an error names


def is_count(amount: Any) -> bool:
    """Return whether an amount is a whole number of units, weights or layers: an int from 1.

    Examples:
        >>> is_count(1), is_count(50), is_count(1.0), is_count(0.5), is_count(0), is_count(True)
        (True, True, False, False, False, False)
    """
    return isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1


def is_number(value: Any) -> bool:
    """Return whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_amount(where: str, amount: Amount, most: str = "1)") -> None:
    """Refuse amounts that are neither fractions nor whole numbers from 1.

    Args:
        where: The function or callback, for errors.
        amount: What was given.
        most: How the range of fractions ends: ``"1)"``, or ``"1]"`` where all may be removed.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one is no number.
    """
    if not isinstance(amount, Mapping):
        _check_one(f"{where}(amount={amount!r})", amount, most)
        return
    if not amount:
        raise ValueError(
            f"{where}(amount={{}}): it names nothing, so nothing would leave. Give patterns, or a fraction."
        )
    for key, own in amount.items():
        _check_one(f"{where}(amount={{{quoted(key)}: {own!r}}})", own, most)


def check_single(where: str, amount: Any, of: str = "all weights") -> None:
    """Refuse what is no number, where amounts by pattern are none that can be met; ``of`` what it is a share.

    Raises:
        TypeError: Saying so.
    """
    if not is_number(amount):
        raise TypeError(
            f"{where}(amount={amount!r}): it is a fraction or a whole number of {of}. Keep layers out by ignore=."
        )


def check_count(where: str, name: str, value: Any, least: int, counted: str) -> None:
    """Refuse an argument that is no whole number of what it counts, or is below ``least``.

    Raises:
        ValueError: Saying so.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where}({name}={value!r}): it is a number of {counted}, from {least}.")


def _check_one(where: str, amount: Any, most: str) -> None:
    if not is_number(amount):
        raise TypeError(f"{where}: amount is a fraction or a whole number, or these by pattern of module paths.")
    if 0 <= amount < 1 or is_count(amount) or (amount == 1 and most == "1]"):
        return
    hint = ""
    if 1 <= amount < 100 and amount == int(amount):
        hint = f" Write {amount / 100:g} to remove {amount:g} %, or {int(amount)} without a point to remove that many."
    elif 1 < amount < 100:
        hint = f" Write {amount / 100:g} to remove {amount:g} %."
    raise ValueError(
        f"{where}: amount is the fraction that leaves and must lie in [0, {most}, or a whole number from 1.{hint}"
    )


def fraction_of(amount: float, size: int, what: str) -> float:
    """Return an amount as a fraction of ``size`` units, weights or layers.

    Args:
        amount: A fraction, which is returned as it is, or a whole number.
        size: How many there are in the dense model.
        what: What is counted, for errors, such as ``"units of conv1"``.

    Raises:
        PruningError: If nothing would be left of them.

    Examples:
        >>> fraction_of(0.3, 50, "units"), fraction_of(10, 50, "units")
        (0.3, 0.2)
    """
    if not is_count(amount):
        return amount
    if amount >= size:
        raise PruningError(_too_many(amount, [(what, size)]))
    return amount / size


def in_fractions(amount: Amount, sizes: Mapping[str, int], scope: str, what: str) -> Amount:
    """Return whole numbers of units or weights as fractions; fractions are returned as they are.

    Args:
        amount: A fraction or whole number, or either by name.
        sizes: Name of a channel group or weight -> units or entries that it has in the dense model.
        scope: ``"layer"`` takes a whole number from each, ``"global"`` from all together.
        what: What is counted, for errors: ``"units"`` or ``"weights"``.

    Returns:
        A fraction of all, or fractions by name.

    Raises:
        PruningError: If nothing would be left of one of them.

    Examples:
        >>> in_fractions(3, {"a": 6, "b": 12}, "layer", "units"), in_fractions(3, {"a": 6, "b": 12}, "global", "units")
        ({'a': 0.5, 'b': 0.25}, 0.16666666666666666)
    """
    if isinstance(amount, Mapping):
        return {name: fraction_of(own, sizes[name], f"{what} of {name}") for name, own in amount.items()}
    if not is_count(amount):
        return amount
    if scope == "global":
        return fraction_of(amount, sum(sizes.values()), what)
    small = [(f"{what} of {name}", size) for name, size in sizes.items() if size <= amount]
    if small:
        raise PruningError(_too_many(amount, small))
    return {name: amount / size for name, size in sizes.items()}


def quoted(given: Any) -> str:
    """Return a pattern in quotes, or a module by its class: printed as it is, a module can be pages long."""
    return f"this {type(given).__name__}" if isinstance(given, nn.Module) else repr(given)


def _too_many(amount: float, sizes: list[tuple[str, int]]) -> str:
    listed = ", ".join(f"{size} {what}" for what, size in sizes[:_MOST])
    more = f" and {len(sizes) - _MOST} more layers" if len(sizes) > _MOST else ""
    return (
        f"amount={amount} leaves nothing where there are {listed}{more}. Ask for less, for a fraction, for amounts by "
        "pattern of module paths, or name such layers in ignore=."
    )
