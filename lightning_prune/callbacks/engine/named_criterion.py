"""Looks a criterion up by its name or import path, as YAML gives it."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from typing import Any


def found_criterion(where: str, criterion: Any, known: Iterable[str]) -> Any:
    """Return the name of a known criterion, or a function: the one that was passed, or that an import path names.

    Raises:
        ValueError: If there is no such name, or nothing to call under the path.
    """
    names = list(known)
    if not isinstance(criterion, str) or criterion in names:
        if callable(criterion) or isinstance(criterion, str):
            return criterion
        raise ValueError(f"{where}(criterion={criterion!r}): pass a name, an import path or a function.")
    try:
        found = pkgutil.resolve_name(criterion) if "." in criterion else None
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}(criterion={criterion!r}): it cannot be imported ({error}). Give the path of a function, "
            "package.module.function, that can be imported where training starts."
        ) from error
    if not callable(found):
        raise ValueError(
            f"{where}(criterion={criterion!r}): choose one of {', '.join(map(repr, names))}, the "
            "import path of a function, or a function."
        )
    return found
