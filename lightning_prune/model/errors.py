"""The one exception of the package that is about the model in hand rather than about an argument."""

__all__ = ["PruningError"]


class PruningError(RuntimeError):
    """The model, the data or the run at hand cannot be pruned as asked; the model has been left as it was."""
