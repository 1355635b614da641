"""Feeds nonsense to callbacks, command line and checkpoints, and counts how each case ended.

What is refused must say so in words, before an optimizer has stepped or with the model whole, and no hook may stay.
What fails in torch or Lightning without any pruning, too, is counted as such.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from benchmarks.trust.nonsense.arguments import ARGUMENTS, YAML, with_arguments, with_yaml
from benchmarks.trust.nonsense.files import FILES, with_files
from benchmarks.trust.nonsense.models import MODELS, with_models

__all__ = ["KINDS", "attempts", "fuzz_all"]

KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], str]]] = {
    "arguments": (ARGUMENTS, with_arguments),
    "models": (MODELS, with_models),
    "yaml": (YAML, with_yaml),
    "files": (FILES, with_files),
}
"""What is fed -> cases, and what feeds one and tells how it ended."""


def attempts(kind: str, examples: int, seed: int = 0) -> Counter[str]:
    """Feed so many cases of a kind, and count how they ended.

    Raises:
        AssertionError: With the simplest case that broke its promise.
    """
    ended: Counter[str] = Counter()
    cases, feed = KINDS[kind]

    @seeded(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def run(case: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ended[feed(case)] += 1

    run()
    return ended


def fuzz_all(examples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Feed cases of every kind; where one broke its promise the simplest such case is told."""
    found = {}
    for kind in KINDS:
        failure = ""
        ended: Counter[str] = Counter()
        try:
            ended = attempts(kind, examples, seed)
        except BaseException as error:
            parts = [error, *getattr(error, "exceptions", ())]
            told = ["".join([f"{type(part).__name__}: {part}", *getattr(part, "__notes__", [])]) for part in parts]
            failure = "\n".join(told)[:3000]
        found[kind] = {"ended": dict(ended), "failure": failure}
    return found
