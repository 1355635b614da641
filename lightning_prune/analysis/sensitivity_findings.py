"""Holds what a sensitivity analysis found: in files, and as amounts that pruning takes; measures nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_prune.pruning.arguments import names_module

__all__ = ["GroupSensitivity", "Mode", "Sensitivity", "amount_paths"]

Mode = Literal["max", "min"]
"""Whether a higher or a lower metric is better."""


@dataclass(frozen=True)
class GroupSensitivity:
    """The metric of the model with one channel group cut and all others whole.

    Attributes:
        name: The group.
        producers: Paths of the modules that produce its channels.
        width: Number of its units.
        shares: Fractions of its units really removed, whole units each, rising.
        values: The metric at each share.
    """

    name: str
    producers: tuple[str, ...]
    width: int
    shares: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What a model loses when one channel group after another is cut.

    Attributes:
        metric: Name of the metric.
        mode: ``"max"`` where a higher metric is better, ``"min"`` where a lower one is.
        criterion: Name of the criterion that chose the units.
        asked: Shares asked for.
        weights: Checksum of the model's parameters and buffers.
        dense: The metric of the whole model.
        groups: What was measured, group by group.
        skipped: Group name -> why its cut could not be proved.
    """

    metric: str
    mode: Mode
    criterion: str
    asked: tuple[float, ...]
    weights: str
    dense: float
    groups: tuple[GroupSensitivity, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    def amounts(self, drop: float) -> dict[str, float]:
        """Derive how much may leave of each group alone so that the metric stays within ``drop`` of the whole model's.

        A share counts only if every smaller one measured stays within, too. Groups of which nothing may leave are left
        out. The drops of several groups add up, so what may leave of all together before retraining is less.

        Args:
            drop: How much worse the metric may be, in its own unit.

        Returns:
            Path of a module that produces the channels -> fraction of them, as ``amount=`` takes it.

        Raises:
            ValueError: If ``drop`` is negative.
        """
        return {path: share for path, share in self._amounts(drop).items() if share > 0}

    def within(self, group: GroupSensitivity, drop: float) -> float:
        """Return the largest share of one group at which, as at every smaller one, the metric stays within ``drop``."""
        if not drop >= 0:
            raise ValueError(f"drop={drop!r}: it says how much worse the metric may be, as a number from 0.")
        sign = 1 if self.mode == "max" else -1
        tolerance = 1e-6 * max(1.0, abs(self.dense))  # metrics of Lightning are float32
        largest = 0.0
        for share, value in zip(group.shares, group.values, strict=True):
            if not sign * (self.dense - value) <= drop + tolerance:  # so written, NaN is not within
                break
            largest = share
        return largest

    def to_json(self, path: str | Path) -> None:
        """Write everything to a file, which is whole at any moment, even if the process is killed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(unfinished, path)

    @classmethod
    def from_json(cls, path: str | Path) -> Sensitivity:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If the file holds something else.
        """
        try:
            found = json.loads(Path(path).read_text())
            groups = tuple(GroupSensitivity(**{k: _frozen(v) for k, v in group.items()}) for group in found["groups"])
            return cls(**found | {"asked": tuple(found["asked"]), "groups": groups})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no sensitivity analysis ({type(error).__name__}: {error}).") from error

    def to_yaml(self, path: str | Path, drop: float) -> None:
        """Write :meth:`amounts` as a block of YAML that may stand under a callback's ``init_args``."""
        lines = [
            f"# Each alone leaves {self.metric} within {drop:g} of the whole model's {self.dense:.6g}; not retrained."
        ]
        lines += ["amount:" if self.amounts(drop) else "amount: {}"]
        for name, share in self._amounts(drop).items():
            lines.append(f"  {json.dumps(name)}: {share}" if share > 0 else f"  # {json.dumps(name)}: nothing")
        Path(path).write_text("\n".join(lines) + "\n")

    def _amounts(self, drop: float) -> dict[str, float]:
        shares = {group.name: self.within(group, drop) for group in self.groups}
        producers = {group.name: group.producers for group in self.groups}
        paths = amount_paths(producers)
        together = [_named(path, producers) for path in dict.fromkeys(paths.values())]
        for _ in together:  # a path that names several groups gives them one amount, the smallest; that may spread
            for names in together:
                shares |= dict.fromkeys(names, min(shares[name] for name in names))
        return {path: shares[name] for name, path in paths.items()}


def amount_paths(producers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Find a key of ``amount=`` for every group: the path of a producer, if possible one that names no other group.

    Args:
        producers: Group name -> paths of the modules that produce its channels.

    Returns:
        Group name -> path.
    """
    named = {path: len(_named(path, producers)) for made in producers.values() for path in made}
    return {name: min(made, key=named.__getitem__) for name, made in producers.items()}


def _named(path: str, producers: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for name, made in producers.items() if any(names_module(path, other) for other in made)]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
