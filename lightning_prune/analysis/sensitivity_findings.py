"""Results of a sensitivity analysis, their files, and the amounts derived from them."""

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
    """The metric with one channel group pruned and all others dense.

    Attributes:
        name: Name of the group.
        producers: Paths of the modules that produce its channels.
        width: Number of its units.
        shares: Fractions of its units pruned, each a whole number of units, rising.
        values: The metric at each fraction.
    """

    name: str
    producers: tuple[str, ...]
    width: int
    shares: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The metric of a model with one channel group after another pruned alone.

    Attributes:
        metric: Name of the metric.
        mode: ``"max"`` where a higher metric is better, ``"min"`` where a lower one is.
        criterion: Name of the criterion that chose the units.
        asked: Requested fractions.
        weights: Checksum of the model's parameters and buffers.
        dense: The metric of the dense model.
        groups: Results, group by group.
        skipped: Group name -> why its pruning could not be verified.
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
        """Return the largest fraction of each group that keeps the metric within ``drop`` of the dense model's.

        A fraction counts only if every smaller one measured is within ``drop``, too. Groups of which nothing can be
        pruned are left out. The drops of several groups add up, so together they allow less before retraining.

        Args:
            drop: How much worse the metric may become, in its own unit.

        Returns:
            Path of a module that produces the channels -> fraction of them, for ``amount=``.

        Raises:
            ValueError: If ``drop`` is negative.
        """
        return {path: share for path, share in self._amounts(drop).items() if share > 0}

    def within(self, group: GroupSensitivity, drop: float) -> float:
        """Return the largest fraction of one group at which, as at every smaller one, the metric is within ``drop``."""
        if not drop >= 0:
            raise ValueError(f"drop={drop!r}: must be 0 or more. It is how much worse the metric may become.")
        sign = 1 if self.mode == "max" else -1
        tolerance = 1e-6 * max(1.0, abs(self.dense))  # metrics of Lightning are float32
        largest = 0.0
        for share, value in zip(group.shares, group.values, strict=True):
            if not sign * (self.dense - value) <= drop + tolerance:  # written so that NaN is not within
                break
            largest = share
        return largest

    def to_json(self, path: str | Path) -> None:
        """Write the results to a file, atomically: it is complete even if the process is killed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(unfinished, path)

    @classmethod
    def from_json(cls, path: str | Path) -> Sensitivity:
        """Read a file written by :meth:`to_json`.

        Raises:
            ValueError: If the file holds no such results.
        """
        try:
            found = json.loads(Path(path).read_text())
            found["asked"] = tuple(found["asked"])
            found["groups"] = tuple(GroupSensitivity(**_frozen(group)) for group in found["groups"])
            return cls(**found)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no sensitivity analysis ({type(error).__name__}: {error}).") from error

    def to_yaml(self, path: str | Path, drop: float) -> None:
        """Write :meth:`amounts` as YAML for a callback's ``init_args``."""
        dense = f"{self.dense:.6g}"
        lines = [f"# Each alone keeps {self.metric} within {drop:g} of the dense model's {dense}, without retraining."]
        lines.append("amount:" if self.amounts(drop) else "amount: {}")
        for name, share in self._amounts(drop).items():
            lines.append(f"  {json.dumps(name)}: {share}" if share > 0 else f"  # {json.dumps(name)}: nothing")
        Path(path).write_text("\n".join(lines) + "\n")

    def _amounts(self, drop: float) -> dict[str, float]:
        shares = {group.name: self.within(group, drop) for group in self.groups}
        producers = {group.name: group.producers for group in self.groups}
        paths = amount_paths(producers)
        together = [_named(path, producers) for path in dict.fromkeys(paths.values())]
        # A path that names several groups gives all of them one amount, the smallest. Groups of two paths pass it on,
        # which takes at most one round for each path.
        for _ in together:
            for names in together:
                smallest = min(shares[name] for name in names)
                shares.update(dict.fromkeys(names, smallest))
        return {path: shares[name] for name, path in paths.items()}


def amount_paths(producers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return a key of ``amount=`` for every group: the path of a producer, if possible one that names no other group.

    Args:
        producers: Group name -> paths of the modules that produce its channels.

    Returns:
        Group name -> path.
    """
    paths = {}
    for name, made in producers.items():
        paths[name] = min(made, key=lambda path: len(_named(path, producers)))
    return paths


def _named(path: str, producers: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the groups that a key of ``amount=`` names."""
    found = []
    for name, made in producers.items():
        if any(names_module(path, producer) for producer in made):
            found.append(name)
    return found


def _frozen(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a group with lists, as JSON has them, turned into tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
