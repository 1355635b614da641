"""The oracle of every cut, independent of the library's own proof: a model whose gone channels reach nothing."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# module type -> dimensions of its weight that it sums over
CONSUMED: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (nn.Linear, (1,)),
    (nn.Bilinear, (1, 2)),
    (nn.modules.conv._ConvTransposeNd, (0,)),
    (nn.modules.conv._ConvNd, (1,)),
    (nn.RNNBase, (1,)),
    (nn.RNNCellBase, (1,)),
]


def silenced(
    model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]], consumers: Mapping[str, int] | None = None
) -> nn.Module:
    """Return a copy with zeros wherever a weight reads channels that are not among those kept.

    Args:
        model: The full model.
        kept: Name of a tensor -> dimension -> indices that stay.
        consumers: Bare parameters that are summed over, with the dimension.
    """
    model = copy.deepcopy(model)
    read = {id(model.get_parameter(name)): (dim,) for name, dim in (consumers or {}).items()}
    for module in model.modules():
        dims = next((dims for kind, dims in CONSUMED if isinstance(module, kind)), ())
        for name, weight in module.named_parameters(recurse=False) if dims else ():
            if name.startswith("weight"):
                read[id(weight)] = dims
    for name, parameter in model.named_parameters():
        for dim in set(read.get(id(parameter), ())) & kept.get(name, {}).keys():
            gone = sorted(set(range(parameter.shape[dim])) - set(kept[name][dim].tolist()))
            parameter.data.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), 0.0)
    return model


def silence_(model, kept, shared=()):
    """Set to zero what a cut removes; the dimension of ``shared`` weights that all groups share stays."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, indices in kept.get(name, {}).items():
                gone = [index for index in range(parameter.shape[dim]) if index not in indices.tolist()]
                if not (name in shared and dim == 1):
                    parameter.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0)


def assert_equal_to_rounding(found: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    scale = expected.abs().max().item()
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= relative * max(scale, 1e-300)
