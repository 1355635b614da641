"""Numbers that hide errors: scales of nothing, dead units, outputs without numbers, dull inputs, half precision.

Every module holds an attention whose heads code counts by a number: cut at the wrong width, it computes something else.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import case, tokens

MOST = {"block.qkv.weight": 24}
OTHERS = ["enter", "out", "gate"]


class Attention(nn.Module):
    """Heads are counted in a config."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(heads=4)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def heads(self):
        return self.config.heads

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part.reshape(b, t, self.heads(), -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = ((q @ k.mT) * 0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


class Literal(Attention):
    """Heads are counted by a literal."""

    def heads(self):
        return 4


class Net(nn.Module):
    """Adds what an attention makes to a stream, in a way that may hide it."""

    def __init__(self, attention, joined, tail):
        super().__init__()
        self.joined, self.tail = joined, tail
        self.enter, self.block, self.out = nn.Linear(8, 16), attention(), nn.Linear(16, 5)
        self.gate = nn.Linear(16, 16)
        self.scale = joined.scale() if isinstance(joined, Scaled) else None
        self.limit, self.alpha = 1e-9, 0.0

    def forward(self, x):
        x = self.enter(x)
        y = JOINED["plain"](self, x, self.block(x)) if self.joined is None else self.joined(self, x, self.block(x))
        return self.tail(self.out(y))


class Scaled:
    """Joins by a scale that is next to nothing."""

    def __init__(self, scale, join=lambda m, x, y: x + m.scale * y):
        self.scale, self.join = scale, join

    def __call__(self, m, x, y):
        return self.join(m, x, y)


JOINED = {
    "plain": lambda m, x, y: x + y,
    "layer scale": Scaled(lambda: nn.Parameter(torch.full((16,), 1e-5))),
    "tiny layer scale": Scaled(lambda: nn.Parameter(torch.full((16,), 1e-12))),
    "one scale": Scaled(lambda: nn.Parameter(torch.tensor(1e-5))),
    "rezero": Scaled(lambda: nn.Parameter(torch.zeros(1))),
    "rezero without dimension": Scaled(lambda: nn.Parameter(torch.zeros(()))),
    "tensor": Scaled(lambda: torch.zeros(1, dtype=torch.float64), lambda m, x, y: x + m.scale.to(x.dtype) * y),
    "addcmul": Scaled(lambda: nn.Parameter(torch.full((16,), 1e-6)), lambda m, x, y: torch.addcmul(x, m.scale, y)),
    "lerp": Scaled(lambda: nn.Parameter(torch.zeros(16)), lambda m, x, y: torch.lerp(x, y, m.scale)),
    "number": lambda m, x, y: x + m.alpha * y,
    "clamped": lambda m, x, y: x + y.clamp(-m.limit, m.limit),
    "closed gate": lambda m, x, y: x + y * (m.gate(x) - 60 * (1 - m.alpha)).sigmoid(),
    "dead": lambda m, x, y: x + (y - 1e3 * (1 - m.alpha)).relu(),
    "where": lambda m, x, y: torch.where(y > 1e9 * (1 - m.alpha), y, x),
    "rounded": lambda m, x, y: x + (y * (1 + 99 * m.alpha) / 50).round() * 50,
    "without gradient": lambda m, x, y: x + y.detach(),
}
TAILS = {
    "argmax": lambda z: z.argmax(-1),
    "indices": lambda z: z.topk(2, -1)[1],
    "order": lambda z: z.argsort(-1),
    "yes or no": lambda z: z > 0,
    "counts": lambda z: (z > 0).sum(-1),
    "integers": lambda z: (z * 10).round().int(),
    "bytes": lambda z: z.clamp(0, 255).to(torch.uint8),
    "one hot": lambda z: F.one_hot(z.argmax(-1), 5),
    "no numbers": lambda z: z / 0 * 0,
    "infinite": lambda z: z / 0.0,
    "complex": lambda z: torch.complex(z, z),
    "spectrum": lambda z: torch.fft.rfft(z),
    "loss": lambda z: z.square().mean(),
    "loss in a dict": lambda z: {"loss": z.logsumexp(-1).mean(), "n": 3},
    "saturated": lambda z: (z * 1e6).sigmoid(),
    "sign": lambda z: z.sign(),
    "nothing": lambda z: None,
    "text": lambda z: ("x", z.argmax()),
    "zero": lambda z: z * 0,
    "float": lambda z: z.sum().item(),
    "sparse": lambda z: z.to_sparse(),
}
INPUTS = {
    "zeros": torch.zeros(2, 5, 8),
    "ones": torch.ones(2, 5, 8),
    "one token of one": tokens(1, 1),
    "one token": tokens(2, 1),
    "huge": tokens() * 1e6,
    "tiny": tokens() * 1e-9,
    "no numbers": tokens() * float("nan"),
    "infinite": tokens() / 0.0,
    "equal rows": tokens(1, 1).expand(2, 5, 8).clone(),
}


def identity(z):
    return z


def opened(model):
    """Open what hides the attention, and return plain numbers."""
    model.tail, model.alpha, model.limit = identity, 1.0, 9.0
    if isinstance(model.scale, nn.Parameter):
        model.scale.data.fill_(0.5)
    elif model.scale is not None:
        model.scale = model.scale + 1


def _register(name, attention, example, joined="plain", tail=identity, dtype=torch.float32):
    def make():
        return Net(attention, JOINED[joined], tail)

    case(
        "blind", example, f"{attention.__name__} {name}", fresh=tokens(3, seed=9), opened=opened, most=MOST,
        ignore=OTHERS, dtype=dtype,
    )(make)  # fmt: skip


for _attention in (Attention, Literal):
    for _name in JOINED:
        _register(f"joined by {_name}", _attention, tokens(), joined=_name)
    for _name, _tail in TAILS.items():
        _register(f"returns {_name}", _attention, tokens(), tail=_tail)
    for _name, _example in INPUTS.items():
        _register(f"on {_name}", _attention, _example)
    for _dtype in (torch.float16, torch.bfloat16):
        _register(f"in {_dtype}", _attention, tokens(), dtype=_dtype)


class Zero(Literal):
    """Its last layer begins with zeros."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


_register("from zeros", Zero, tokens())


class Mixed(Literal):
    """Runs in bfloat16 by itself."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).to(x.dtype)


case("blind", tokens(), "Mixed precision inside", ignore=OTHERS, most=MOST, tolerance=0.05)(
    lambda: Net(Mixed, JOINED["plain"], identity)
)


class Masked(nn.Module):
    """Multiplies what an attention makes by a mask that the example sets to zero."""

    def __init__(self):
        super().__init__()
        self.enter, self.block, self.out = nn.Linear(8, 16), Literal(), nn.Linear(16, 5)

    def forward(self, x, mask):
        x = self.enter(x)
        return self.out(x + self.block(x) * mask[..., None].to(x.dtype))


for _dtype in (torch.float32, torch.bool, torch.int64):
    case(
        "blind", (tokens(), torch.zeros(2, 5).to(_dtype)), f"Masked by {_dtype}",
        fresh=(tokens(3, seed=9), torch.ones(3, 5).to(_dtype)), ignore=["enter", "out"], most=MOST,
    )(Masked)  # fmt: skip


class Padded(nn.Module):
    """Looks up nothing but padding on the example."""

    def __init__(self):
        super().__init__()
        self.enter, self.block, self.out = nn.Embedding(9, 16, padding_idx=0), Literal(), nn.Linear(16, 5)

    def forward(self, ids):
        x = self.enter(ids)
        return self.out(x + self.block(x))


case("blind", torch.zeros(2, 5, dtype=torch.int64), ignore=["enter", "out"], most=MOST)(Padded)
