"""The pretend accelerator as the device ``sim`` of torch, and as an accelerator of Lightning's.

Only processes of their own load it: torch does not forget a device again.
"""

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch.accelerators import CUDAAccelerator

DEVICE = "sim"


def load(library: Path) -> None:
    """Load the built library, and make its device known to torch."""
    torch.utils.rename_privateuse1_backend(DEVICE)
    torch.ops.load_library(library)
    own = torch.ops.simulated
    module = types.ModuleType(f"torch.{DEVICE}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module._lazy_init = lambda *device: None
    module.device = lambda device=None: contextlib.nullcontext()
    module.manual_seed = module.manual_seed_all = lambda seed: own.manual_seed(seed % 2**63)
    module.get_rng_state = lambda device=None: own.get_rng_state()
    module.set_rng_state = lambda state, device=None: own.set_rng_state(state)
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(DEVICE, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _IMPLEMENTATIONS.impl("set_.source_Storage", _set_from_storage, "PrivateUse1")
    _IMPLEMENTATIONS.impl("set_.source_Tensor", _set_from_tensor, "PrivateUse1")


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """Refuse tensors of 64-bit numbers on the device inside the block, as MPS does."""
    torch.ops.simulated.refuse_float64(True)
    try:
        yield
    finally:
        torch.ops.simulated.refuse_float64(False)


_IMPLEMENTATIONS = torch.library.Library("aten", "IMPL")
_SET = torch.ops.aten.set_.source_Storage_storage_offset


def _set_from_storage(tensor, storage):
    return _SET(tensor, storage, 0, [storage.nbytes() // tensor.element_size()], [1])


def _set_from_tensor(tensor, other):
    return _SET(tensor, other.untyped_storage(), other.storage_offset(), other.size(), other.stride())


class Accelerator(CUDAAccelerator):
    """The pretend accelerator for a Trainer, which takes it for one of CUDA's."""

    def setup_device(self, device):
        assert device.type == DEVICE

    def setup(self, trainer):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return [0]

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(DEVICE, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return DEVICE
