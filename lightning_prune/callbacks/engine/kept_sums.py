"""Narrows what was gathered for units to those that a cut keeps; gathers nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_prune.structure import Keep


def of_kept_units(gathered: Mapping[str, list[Any]], keep: Keep) -> dict[str, list[Any]]:
    """Return what was gathered, as ``group -> [total, count]`` or ``group/what -> ...``, of the units that are kept."""
    found = {}
    for name, (total, count) in gathered.items():
        kept = keep.get(name.partition("/")[0])
        fits = kept is not None and total.shape == kept.shape
        found[name] = [total[torch.from_numpy(kept)] if fits else total, count]
    return found
