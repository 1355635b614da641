"""What every test and doctest may take for granted: `torch` and `nn` by name in doctests, the same seed each time."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace.update(torch=torch, nn=nn)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
