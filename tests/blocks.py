"""Stacks of residual blocks of several kinds, for tests of whole layers."""

import dataclasses

import torch
from torch import nn

WIDTH = 6


@dataclasses.dataclass
class Output:
    """What some blocks return, as those of language models do."""

    hidden: torch.Tensor
    extra: object = None


class Block(nn.Module):
    """A residual block of one of several kinds; it returns its output in one of several forms."""

    def __init__(self, kind, form, width=WIDTH):
        super().__init__()
        self.kind, self.form = kind, form
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.3)

    def branch(self, x):
        return self.drop(self.down(torch.tanh(self.up(x))))

    def forward(self, hidden, scale=1.0):
        if self.kind == "pre":
            hidden = hidden + scale * self.branch(self.norm(hidden))
        elif self.kind == "post":
            hidden = self.norm(hidden + self.branch(hidden))
        elif self.kind == "in place":
            hidden += self.branch(torch.tanh(hidden))
        else:
            hidden = self.branch(hidden)
        return {"tensor": hidden, "tuple": (hidden, None), "data": Output(hidden), "dict": {"hidden": hidden}}[
            self.form
        ]


def plain(output):
    """Return the tensor in what a block returned."""
    if isinstance(output, Output):
        return output.hidden
    return output["hidden"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output


class Stack(nn.Module):
    """Blocks between an embedding and a head, but for those that are ``without``: then they are not even built."""

    def __init__(self, kinds, forms, by_name=(), without=()):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.by_name = by_name
        self.blocks = nn.ModuleDict({f"b{i}": Block(kinds[i], forms[i]) for i in range(len(kinds)) if i not in without})
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.embed(x)
        for name, block in self.blocks.items():
            x = plain(block(hidden=x) if name in self.by_name else block(x, 0.5))
        return self.head(x)


def without(model, make, gone):
    """Return a model that was built without some blocks, with the weights of the others."""
    twin = make(gone)
    own = model.state_dict()
    twin.load_state_dict({name: own[name].clone() for name in twin.state_dict()})
    return twin.train(model.training)
