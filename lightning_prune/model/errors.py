"""The exception of this package, and the failures that say nothing about a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["NoGradientError", "OutOfReachError", "PruningError", "failures_suppressed", "reraise_out_of_memory"]


class PruningError(RuntimeError):
    """The model, the data or the run cannot be pruned as requested; the model is unchanged."""


class NoGradientError(PruningError):
    """A criterion follows autograd, which does not reach what it should score."""


class OutOfReachError(PruningError):
    """Less can leave the model than was asked for, even if everything that may leave does."""


def reraise_out_of_memory(error: BaseException) -> None:
    """Raise an error again if memory ran out: that says nothing about the model, so no conclusion may be drawn."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no class for it
    if on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError):
        raise error


@contextmanager
def failures_suppressed() -> Iterator[None]:
    """Go on after the body if it fails, unless memory ran out."""
    try:
        yield
    except Exception as error:
        reraise_out_of_memory(error)
