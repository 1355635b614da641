"""Sets what was asked of a pruning against what it reached, and says why where that is less; changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.measure.footprint import Footprint
from lightning_prune.pruning.amounts import Amount
from lightning_prune.pruning.budget import NEAR, Budget, Dense, Target
from lightning_prune.pruning.limits import rounding_in_words
from lightning_prune.structure import Structure

__all__ = ["Outcome", "kept_whole_by", "outcome_of", "reasons_of", "reasons_in_words"]

_ROUNDING = 1e-6
_MOST = 6  # groups that are named


@dataclass(frozen=True)
class Outcome:
    """What was asked, what was reached, and why that is less.

    Attributes:
        asked: Share of the target that was to leave; for amounts by group, of the filters of all that are named.
        reached: The share that left.
        short: Where less left than was asked, both in words, with the reasons; of the latency, which is measured, also
            where more left; else empty.
    """

    asked: float
    reached: float
    short: str

    def warn(self, where: str) -> None:
        """Warn, once, if less was reached than asked; ``where`` it was asked."""
        if self.short:
            warnings.warn(f"{where}: {self.short}", stacklevel=4)  # behind this, the function and its decorator


def outcome_of(
    amount: Amount,
    target: Target,
    dense: Dense,
    widths: Mapping[str, int],
    now: Footprint,
    latency_kept: float | None,
    why: Mapping[str, str],
) -> Outcome:
    """Set what was asked against what was reached.

    Args:
        amount: The fraction of the target that was to leave, or fractions of filters by group name.
        target: What it is a fraction of.
        dense: What was there at the start.
        widths: Group name -> units that are left.
        now: Parameters and multiply-adds that are left.
        latency_kept: Share of the latency that is left, where that is the target.
        why: Group name -> what keeps more of it than was asked.
    """
    shares = amount if isinstance(amount, Mapping) else dict.fromkeys(dense.widths, amount)
    named = {name: dense.widths[name] for name in shares if name in dense.widths}
    gone = {name: 1 - widths.get(name, width) / width for name, width in named.items()}
    behind = [name for name in named if gone[name] < shares[name] - _ROUNDING]
    if target == "filters":
        units = max(sum(named.values()), 1)
        asked = sum(shares[name] * width for name, width in named.items()) / units
        reached = sum(gone[name] * width for name, width in named.items()) / units
    else:
        assert not isinstance(amount, Mapping)  # amounts by group are of filters
        asked, reached = amount, _reached(target, dense, now, latency_kept)
    near = NEAR * (1 - asked) if target == "latency" else _ROUNDING
    short = reached < asked - near
    if target == "latency":  # a measurement that was disturbed removes too much, too; one unit may weigh something
        short = short or reached > asked + 2 * near
    if isinstance(amount, Mapping):  # what one layer gave more does not compensate for another
        short = bool(behind)
    if not short:
        return Outcome(asked, reached, "")
    shares_lost = []
    for name in sorted(behind, key=lambda name: (name not in why, -named[name])):
        reason = f" ({why[name]})" if name in why else ""
        shares_lost.append(f"{name} lost {gone[name]:.1%} of {shares[name]:.1%}{reason}")
    which = f" {_listed(shares_lost)}." if shares_lost else ""
    return Outcome(asked, reached, f"asked to prune {asked:.1%} of the {target}, pruned {reached:.1%}.{which}")


def _listed(items: list[str]) -> str:
    shown = items[:_MOST]
    if len(items) > _MOST:
        shown.append(f"and {len(items) - _MOST} more")
    return "; ".join(shown)


def reasons_of(structure: Structure, slim: Structure) -> dict[str, str]:
    """Return, for every group that one structure has and a later one of the same model pins, the reason."""
    found = {}
    for name, group in structure.groups.items():
        if name not in slim.groups:
            own = {(slot.tensor, slot.dim) for slot in group.slots if slot.role == "producer"}
            reasons_of_group = [pin.reason for pin in slim.pinned if (pin.tensor, pin.dim) in own]
            found[name] = reasons_of_group[-1] if reasons_of_group else "its cut could not be proved"
    return found


def reasons_in_words(reasons: Mapping[str, str]) -> str:
    """Say of groups why they were refused; nothing where there are none."""
    if not reasons:
        return ""
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_MOST]]
    if len(reasons) > _MOST:
        lines.append(f"  and {len(reasons) - _MOST} more")
    return "\n".join(["\nGroups whose cut could not be proved stay whole:", *lines])


def kept_whole_by(structure: Structure, budget: Budget, dense: Dense, widths: Mapping[str, int]) -> dict[str, str]:
    """Return, for every group that is as narrow as it may become, or could not come nearer, what limits it."""
    found = {}
    for name, limit in budget.least(structure, dense).items():
        if widths.get(name, 0) <= limit.width:
            found[name] = limit.why
        elif budget.round_to > 1 or budget.parts > 1:
            found[name] = rounding_in_words(budget.round_to, budget.parts)
    return found


def _reached(target: Target, dense: Dense, now: Footprint, latency_kept: float | None) -> float:
    if target == "latency":
        return 0.0 if latency_kept is None else 1 - latency_kept
    whole = getattr(dense.footprint, target)
    return 1 - getattr(now, target) / max(whole, 1)
