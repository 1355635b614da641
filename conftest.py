"""What every test and doctest may take for granted: `torch` and `nn` by name in doctests, the same seed each time."""

import os

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=nn)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything leaves them to all processes that start later
        os.environ.pop(name, None)
