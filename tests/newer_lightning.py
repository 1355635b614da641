"""What Lightning 2.6 brought, for tests of it: under an older version they are skipped."""

import inspect

import lightning.pytorch as pl
import pytest
from lightning.pytorch import callbacks

__all__ = ["EMAWeightAveraging", "WeightAveraging", "has_averaging", "reading"]

has_averaging = hasattr(callbacks, "WeightAveraging")


class _Missing(pl.Callback):
    """Stands for a callback that this version of Lightning does not have; whoever makes one is skipped."""

    def __init__(self, *args, **kwargs):
        pytest.skip("Lightning has averaged weights from 2.6 on")


WeightAveraging = getattr(callbacks, "WeightAveraging", _Missing)
EMAWeightAveraging = getattr(callbacks, "EMAWeightAveraging", _Missing)


def reading(weights_only: bool) -> dict[str, bool]:
    """Return the argument by which a Trainer is told how to read; before 2.6 it has none, and reads everything."""
    known = "weights_only" in inspect.signature(pl.Trainer.fit).parameters
    return {"weights_only": weights_only} if known else {}
