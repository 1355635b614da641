"""Prune networks while they train with PyTorch Lightning.

The names below are imported when they are first used, so that this import brings in neither Lightning nor fvcore.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "Cubic",
    "FilterL1Pruning",
    "FilterPruning",
    "Geometric",
    "IterativeMagnitudePruning",
    "LayerPruning",
    "Linear",
    "MetricGuard",
    "OBSOneShot",
    "OneCycle",
    "OneShot",
    "Prunable",
    "PruningError",
    "TaylorFilterPruning",
    "apply_masks_",
    "count_flops",
    "coupling_rule",
    "hold_masks",
    "load_from_checkpoint",
    "load_sparse",
    "load_sparse_",
    "load_state_dict_",
    "prune_filters",
    "prune_layers",
    "prune_obs",
    "prune_weights",
    "recalibrate_batch_norm",
    "save_sparse",
    "sensitivity",
    "slim_loading",
]

__version__ = "0.1.0"

# Each module and its public names; a test compares it with the imports that type checkers and editors read.
_HOMES = {
    "algorithms.schedules": ("Cubic", "Geometric", "Linear", "OneCycle", "OneShot"),
    "analysis.layer_sensitivity": ("sensitivity",),
    "callbacks.engine.load_checkpoint": ("load_from_checkpoint",),
    "callbacks.filter_l1": ("FilterL1Pruning",),
    "callbacks.filter_pruning": ("FilterPruning",),
    "callbacks.iterative_magnitude": ("IterativeMagnitudePruning",),
    "callbacks.layer_pruning": ("LayerPruning",),
    "callbacks.metric_guard": ("MetricGuard",),
    "callbacks.obs_one_shot": ("OBSOneShot",),
    "callbacks.taylor_filter": ("TaylorFilterPruning",),
    "measure.flops": ("count_flops",),
    "model.batch_norm": ("recalibrate_batch_norm",),
    "model.errors": ("PruningError",),
    "pruning.filters": ("prune_filters",),
    "pruning.layers": ("prune_layers",),
    "pruning.obs": ("prune_obs",),
    "pruning.weights": ("prune_weights",),
    "structure.rules": ("coupling_rule",),
    "surgery.loading": ("Prunable", "load_state_dict_", "slim_loading"),
    "surgery.masks": ("apply_masks_", "hold_masks"),
    "surgery.sparse_files": ("load_sparse", "load_sparse_", "save_sparse"),
}

if TYPE_CHECKING:
    from lightning_prune.algorithms.schedules import Cubic, Geometric, Linear, OneCycle, OneShot
    from lightning_prune.analysis.layer_sensitivity import sensitivity
    from lightning_prune.callbacks.engine.load_checkpoint import load_from_checkpoint
    from lightning_prune.callbacks.filter_l1 import FilterL1Pruning
    from lightning_prune.callbacks.filter_pruning import FilterPruning
    from lightning_prune.callbacks.iterative_magnitude import IterativeMagnitudePruning
    from lightning_prune.callbacks.layer_pruning import LayerPruning
    from lightning_prune.callbacks.metric_guard import MetricGuard
    from lightning_prune.callbacks.obs_one_shot import OBSOneShot
    from lightning_prune.callbacks.taylor_filter import TaylorFilterPruning
    from lightning_prune.measure.flops import count_flops
    from lightning_prune.model.batch_norm import recalibrate_batch_norm
    from lightning_prune.model.errors import PruningError
    from lightning_prune.pruning.filters import prune_filters
    from lightning_prune.pruning.layers import prune_layers
    from lightning_prune.pruning.obs import prune_obs
    from lightning_prune.pruning.weights import prune_weights
    from lightning_prune.structure.rules import coupling_rule
    from lightning_prune.surgery.loading import Prunable, load_state_dict_, slim_loading
    from lightning_prune.surgery.masks import apply_masks_, hold_masks
    from lightning_prune.surgery.sparse_files import load_sparse, load_sparse_, save_sparse
else:

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*__all__, "__version__"])


_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


class _LightningFinder(MetaPathFinder):
    """Imports the callbacks right after Lightning, because LightningCLI finds only imported ones by short names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _LIGHTNING:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        for finder in others:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _LightningLoader(self, spec.loader)
                return spec
        return None


class _LightningLoader(Loader):
    """Runs a module by its own loader, then imports the callbacks."""

    def __init__(self, finder: _LightningFinder, loader: Loader) -> None:
        self._finder, self._loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if nothing had come between.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _import_callbacks()


def _import_callbacks() -> None:
    """Import the callbacks, and with them the other package of Lightning; the first one goes on to log messages."""
    from lightning_utilities.core import rank_zero

    logger = rank_zero.log  # each package puts its own here when it is imported
    import_module("lightning_prune.callbacks")
    rank_zero.log = logger


if any(name in sys.modules for name in _LIGHTNING):
    _import_callbacks()
else:
    sys.meta_path.insert(0, _LightningFinder())
