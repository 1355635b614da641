"""The class that callbacks derive from, so that the Trainer and the CLI of either of Lightning's packages know them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lightning.pytorch import Callback

__all__ = ["AnyCallback"]

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules:
    AnyCallback = Callback
else:  # the same code under another name, and classes of its own; to import it here would slow everybody down
    import pytorch_lightning

    class AnyCallback(Callback, pytorch_lightning.Callback):
        """A callback for both packages."""
