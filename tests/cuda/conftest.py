"""The device that these tests run on: ``pytest tests/cuda`` takes CUDA, ``--device cpu`` runs what the CPU can."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="device of the tests in tests/cuda")


@pytest.fixture
def device(request) -> str:
    chosen = request.config.getoption("--device", default="cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return chosen


@pytest.fixture
def cuda(device) -> str:
    """For what the CPU has not."""
    if device != "cuda":
        pytest.skip("only CUDA has this")
    return device


@pytest.fixture
def two_gpus(cuda) -> int:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no second CUDA device")
    return 2
