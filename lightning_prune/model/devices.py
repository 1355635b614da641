"""What devices differ in: their random generators, and the widest numbers that they add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "devices_of", "generator_states", "generators_restored", "restore_generators_", "seed_generators_",
    "supported", "widened", "widest_float",
]  # fmt: skip


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices that hold parameters or buffers of a model."""
    devices = {parameter.device for parameter in model.parameters()}
    devices.update(buffer.device for buffer in model.buffers())
    return devices


@contextmanager
def generators_restored(devices: Iterable[torch.device]) -> Iterator[None]:
    """Run the body, then restore the default random generators of the CPU and of all devices in use.

    Those of the accelerator are restored whenever it is in use, since ``torch.manual_seed`` seeds them, too.

    Args:
        devices: Devices, of any kind, whose generators the body may use.
    """
    states = generator_states(devices)
    try:
        yield
    finally:
        restore_generators_(states)


def generator_states(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """Return the states of the default random generators of the CPU and of all devices in use."""
    own = {device for device in devices if device.type not in ("cpu", "meta")} | _devices_in_use()
    return {torch.device("cpu"): torch.get_rng_state()} | {device: _generator_state(device) for device in own}


def restore_generators_(states: Mapping[torch.device, Tensor]) -> None:
    """Set random generators to the states that :func:`generator_states` returned."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            _set_generator_state(device, state)


def supported(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype, or float32 in place of float64 for a device that has no float64."""
    return widest_float(device) if dtype is torch.float64 else dtype


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, or in float32 on a device that has no float64."""
    return tensor.to(widest_float(tensor.device))


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64, such as Apple's."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64


def seed_generators_(seed: int) -> None:
    """Seed the default random generators of the CPU and the accelerator, as ``torch.manual_seed`` does."""
    if _accelerator() is None:
        torch.default_generator.manual_seed(seed)  # torch takes a hundred times as long, to seed what is not there
    else:
        torch.manual_seed(seed)


def _accelerator() -> torch.device | None:
    try:
        return torch.accelerator.current_accelerator()
    except RuntimeError:  # so says torch 2.6 that there is none
        return None


def _devices_in_use() -> set[torch.device]:
    """Return the devices of this machine's accelerator, if anything runs on it."""
    accelerator = _accelerator()
    if accelerator is None or accelerator.type == "mps":
        return set()
    module: Any = torch.get_device_module(accelerator)
    if not module.is_initialized():
        return set()
    return {torch.device(accelerator.type, index) for index in range(module.device_count())}


def _generator_state(device: torch.device) -> Any:
    module: Any = torch.get_device_module(device)
    if device.type == "mps":  # there is one device, which is not named
        return module.get_rng_state()
    return module.get_rng_state(device)


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    module: Any = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)
