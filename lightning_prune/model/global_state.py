"""Random generators and settings that hold for a whole process, so that they can be restored."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as module_file
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

from lightning_prune.model.devices import generator_states, restore_generators_

__all__ = ["GlobalState", "global_containers"]

# Holder -> names of the settings on it. torch keeps them in C; assigning to them sets them.
_FLAGS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        torch.backends.cudnn,
        ("enabled", "benchmark", "benchmark_limit", "deterministic", "allow_tf32", "fp32_precision"),
    ),
    (torch.backends.mkldnn, ("enabled", "deterministic", "allow_tf32", "fp32_precision")),
    (torch.backends.nnpack, ("enabled",)),
    (torch.backends.quantized, ("engine",)),
    (
        torch.backends.cuda.matmul,
        ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
         "fp32_precision"),
    ),
    *(
        (getattr(library, part, None), ("fp32_precision",))
        for library in (torch.backends.cudnn, torch.backends.mkldnn)
        for part in ("conv", "rnn", "matmul")
    ),
    (torch.backends, ("fp32_precision",)),
)  # fmt: skip


def _set_deterministic(found: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(found[0], warn_only=found[1])


def _set_filters(found: list[Any]) -> None:
    warnings.filters[:] = found  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _set_environment(found: dict[str, str]) -> None:
    for name in os.environ.keys() - found.keys():
        del os.environ[name]
    os.environ.update(found)


# How to read a setting and how to set it. Reading does not initialize any device.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (random.getstate, random.setstate),
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _set_deterministic,
    ),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (np.geterr, lambda found: np.seterr(**found)),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (os.getcwd, os.chdir),
    (lambda: dict(os.environ), _set_environment),
    (lambda: list(warnings.filters), _set_filters),
)


class GlobalState:
    """Everything of a process that a forward pass may change without holding it: generators, settings, open modes.

    Args:
        devices: Devices whose random generators are noted, beside the CPU's and those of all GPUs in use.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._settings: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        for read, write in _SETTINGS:
            self._note(read, write)
        for holder, names in _FLAGS:
            for name in names:
                if hasattr(holder, name):
                    self._note(partial(getattr, holder, name), partial(setattr, holder, name))
        for kind in {"cpu", *(device.type for device in devices)} - {"meta"}:
            self._note(partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind))
            self._note(partial(torch.get_autocast_dtype, kind), partial(torch.set_autocast_dtype, kind))
        self._default_device = torch._GLOBAL_DEVICE_CONTEXT.__dict__.copy()
        self._numpy = np.random.get_state()
        self._torch = generator_states(devices)
        self._modes = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()

    def _note(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        with suppress(RuntimeError, OSError):  # a build of torch without it, or a folder that is gone
            self._settings.append((read, write, read()))

    def restore_(self) -> None:
        """Restore what has changed; nothing happens the second time."""
        dispatch, function = self._modes
        while torch._C._len_torch_dispatch_stack() > dispatch:
            _pop_dispatch_mode()
        self._restore_default_device_(function)
        for read, write, before in self._settings:
            with suppress(RuntimeError):  # torch refuses to read or set some beside others, which are next
                if not _reads(read, before):
                    write(before)
        np.random.set_state(self._numpy)
        restore_generators_(self._torch)

    def _restore_default_device_(self, function: int) -> None:
        now, before = vars(torch._GLOBAL_DEVICE_CONTEXT), self._default_device
        if now.get("device_context") is not before.get("device_context"):
            torch.set_default_device(None)  # leaves the mode that the body has entered
        while torch._C._len_torch_function_stack() > function:
            _pop_function_mode()
        if now.get("device_context") is not before.get("device_context"):
            torch.set_default_device(before["device_context"].device)
        if "device_context" not in before:
            now.pop("device_context", None)  # torch 2.6 cannot tell the default device where this is None


def global_containers() -> list[dict[Any, Any]]:
    """Return the dicts in which torch keeps the hooks of all modules."""
    found = []
    for name, value in vars(module_file).items():
        if name.startswith("_global_") and isinstance(value, dict):
            found.append(value)
    return found


def _reads(read: Callable[[], Any], before: Any) -> bool:
    try:
        return bool(read() == before)
    except RuntimeError:  # torch does not read what old and new names of a setting contradict each other on
        return False
