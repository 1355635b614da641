"""The exception of this package."""

__all__ = ["PruningError"]


class PruningError(RuntimeError):
    """The model, the data or the run cannot be pruned as requested; the model is unchanged."""
