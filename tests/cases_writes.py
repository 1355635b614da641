"""Tensors that code makes by itself and fills piece by piece: what is written where tells which of its sizes follow."""

from __future__ import annotations

from tests.cases import case, image, rows, tokens
from tests.cases_written import network

# What makes a tensor of y's batch and positions with {n} channels.
MAKERS = {
    "zeros": "torch.zeros(B, {n}, H, W, dtype=y.dtype)",
    "empty": "torch.empty((B, {n}, H, W), dtype=y.dtype)",
    "full": "torch.full((B, {n}, H, W), 0.5, dtype=y.dtype)",
    "new_zeros": "y.new_zeros(B, {n}, H, W)",
    "new_empty": "y.new_empty((B, {n}, H, W))",
}
# How p (of 8 channels) and q (of 6) are written into z: the channels of z, and the lines that write.
PIECES = {
    "by sizes": ("p.shape[1] + q.shape[1]", "z[:, :p.shape[1]] = p\nz[:, p.shape[1]:] = q"),
    "by size()": ("p.size(1) + q.size(1)", "z[:, :p.size(1)] = p\nz[:, p.size(1):].copy_(q)"),
    "by attributes": ("self.p + self.q", "z[:, :self.p] = p\nz[:, self.p:] = q"),
    "by numbers of layers": (
        "self.b.out_channels + self.c.out_channels",
        "z[:, :self.b.out_channels] = p\nz[:, self.b.out_channels:] = q",
    ),
    "by weights": (
        "self.b.weight.shape[0] + self.c.weight.size(0)",
        "n = self.b.weight.shape[0]\nz[:, :n] = p\nz[:, n:] = q",
    ),
    "lengths": ("len(self.b.weight) + len(self.c.weight)", "n = len(self.b.weight)\nz[:, :n] = p\nz[:, n:] = q"),
    "added": ("p.shape[1] + q.shape[1]", "z.fill_(0)\nz[:, :p.shape[1]] += p\nz[:, p.shape[1]:].add_(q)"),
    "narrow": (
        "p.shape[1] + q.shape[1]",
        "z.narrow(1, 0, p.shape[1]).copy_(p)\nz.narrow(1, p.shape[1], q.shape[1]).copy_(q)",
    ),
    "positions first": (
        "p.shape[1] + q.shape[1]",
        "z[:, :, :3] = torch.cat([p, q], 1)[:, :, :3]\nz[:, :, 3:] = torch.cat([p, q], 1)[:, :, 3:]",
    ),
    "interleaved": ("2 * p.shape[1]", "z[:, ::2] = p\nz[:, 1::2] = p.flip(3)"),
    "twice": ("2 * self.p", "z[:, :self.p] = p\nz[:, self.p:] = p.relu()"),
    "with room": ("p.shape[1] + 6", "z.fill_(0)\nz[:, :p.shape[1]] = p"),
    "literal": ("14", "z[:, :8] = p\nz[:, 8:] = q"),
    "literal room": ("16", "z.fill_(0)\nz[:, :8] = p\nz[:, 8:14] = q"),
}
FOLLOW = {name: {"b.weight": 4, "c.weight": 3} for name in PIECES if name.startswith(("by", "added", "narrow", "posi"))}
FOLLOW |= {"interleaved": {"b.weight": 4}, "twice": {"b.weight": 4}}
"""Pieces that must be cut: parameter -> rows that it may keep."""

# States of (B, n) or (B, n, ...) that loops begin with: further lines of the constructor, and of the forward pass.
STATES = {
    "cell": ("self.r = nn.{cell}(16, 12)", "h = None"),
    "cell zeros": ("self.r = nn.{cell}(16, 12)", "h = torch.zeros(B, self.r.hidden_size, dtype=y.dtype)"),
    "cell new_zeros": ("self.r = nn.{cell}(16, 12)", "h = y.new_zeros((B, self.r.hidden_size))"),
    "cell attribute": ("self.r, self.n = nn.{cell}(16, 12), 12", "h = y.new_zeros(B, self.n)"),
    "cell of the reader": ("self.r = nn.{cell}(16, 12)", "h = y.new_zeros(B, self.e.in_features)"),
    "cell of a weight": ("self.r = nn.{cell}(16, 12)", "h = y.new_zeros(B, self.r.weight_hh.shape[1])"),
}


# Unit matrices and diagonals as wide as y, (B, T, 16); those of another order than the channels have must stay.
UNITS = {
    "size": "y = y @ (self.w + torch.eye(C, dtype=y.dtype))",
    "size twice": "y = y @ (self.w + torch.eye(C, C, dtype=y.dtype))",
    "attribute": "y = y @ (self.w + torch.eye(self.d, dtype=y.dtype))",
    "weight": "y = y @ (self.w + torch.eye(self.w.shape[0], dtype=y.dtype))",
    "layer": "y = y @ (self.w + torch.eye(self.a.out_features, dtype=y.dtype))",
    "twice an attribute": "y = y @ (self.w + torch.eye(2 * self.h, dtype=y.dtype))",
    "kernel": "y = F.conv1d(y.mT, (self.w + torch.eye(C, dtype=y.dtype))[..., None]).mT",
    "loss": "y = y * (self.w @ self.w.t() - torch.eye(C, dtype=y.dtype)).square().sum()",
    "beside the diagonal": "y = y @ (self.w * (1 - torch.eye(C, dtype=y.dtype)))",
    "diag": "y = y @ torch.diag(self.g)",
    "diag_embed": "y = (y[..., None, :] @ torch.diag_embed(self.g.expand(B, T, -1)))[..., 0, :]",
    "literal": "y = y @ (self.w + torch.eye(16, dtype=y.dtype))",
    "literal columns": "y = y @ (self.w + torch.eye(C, 16, dtype=y.dtype))",
    "row": "y = y * torch.eye(C, dtype=y.dtype)[3]",
    "rolled": "y = y @ torch.eye(C, dtype=y.dtype).roll(1, 0)",
    "summed": "y = y @ torch.eye(C, dtype=y.dtype).cumsum(0)",
    "offset": "y = y @ torch.diag_embed(self.g[1:], 1)",
    "positions": "y = y + torch.eye(T, C, dtype=y.dtype)",
}
STAY = {
    "twice an attribute",
    "diag",
    "diag_embed",
    "literal",
    "literal columns",
    "row",
    "rolled",
    "summed",
    "offset",
    "positions",
}


def _register_units():
    own = ["self.a, self.o, self.d, self.h = nn.Linear(8, 16), nn.Linear(16, 5), 16, 8"]
    own += ["self.w, self.g = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.rand(16))"]
    for name, line in UNITS.items():
        body = ["y = self.a(x)", "B, T, C = y.shape", line, "return self.o(y)"]
        most = {} if name in STAY else {"a.weight": 8}
        case("writes", tokens(), f"unit matrix, {name}", most=most)(network(own, body))


# Distributions of m and s, (B, 12), which check their parameters; r is what the model goes on with.
DISTRIBUTIONS = {
    "normal": "d = torch.distributions.Normal(m, s.exp())\nr = d.mean * d.stddev",
    "log_prob": "d = torch.distributions.Normal(m, s.exp())\nr = d.log_prob(m * 0.5)",
    "entropy": "d = torch.distributions.Laplace(m, s.exp())\nr = d.entropy() + m",
    "kl": (
        "p, q = torch.distributions.Normal(m, s.exp()), torch.distributions.Normal(m * 0, s * 0 + 1)\n"
        "r = torch.distributions.kl_divergence(p, q) + m"
    ),
    "bernoulli": "d = torch.distributions.Bernoulli(logits=m)\nr = d.probs + s",
    "gamma": "d = torch.distributions.Gamma(m.exp(), s.exp())\nr = d.mean + d.variance.log1p()",
}


def _register_distributions():
    own = ["self.a, self.m, self.s, self.o = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 4)"]
    for name, lines in DISTRIBUTIONS.items():
        body = ["y = self.a(x).tanh()", "m, s = self.m(y), self.s(y)", *lines.split("\n"), "return self.o(r)"]
        most = {"a.weight": 8, "m.weight": 6}
        case("writes", rows(), f"distribution {name}", most=most, train=False)(network(own, body))


def _register_writes():
    fields = [
        "self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(12, 6, 1)",
        "self.e, self.o, self.p, self.q = nn.Conv2d({n}, 10, 1), nn.Conv2d(10, 4, 1), 8, 6",
    ]
    for maker, made in MAKERS.items():
        for pieces, (count, lines) in PIECES.items():
            width = {"interleaved": 16, "twice": 16, "literal room": 16}.get(pieces, 14)
            own = [line.replace("{n}", str(width)) for line in fields]
            body = ["y = self.a(x).relu()", "B, _, H, W = y.shape", "p, q = self.b(y), self.c(y)"]
            body += [f"z = {made.format(n=count)}", *lines.split("\n"), "return self.o(self.e(z).relu())"]
            most = FOLLOW.get(pieces, {})
            case("writes", image(), f"{pieces} into {maker}", most=most)(network(own, body))


def _register_states():
    loop = "out = []\nfor t in range(T):\n    h = self.r(y[:, t], h)\n    out.append(h if torch.is_tensor(h) else h[0])"
    for cell in ("RNNCell", "GRUCell", "LSTMCell"):
        for name, (field, begin) in STATES.items():
            lines = [begin, "h = h if h is None else (h, h)" if cell == "LSTMCell" else "pass", *loop.split("\n")]
            own = ["self.a, self.e = nn.Linear(8, 16), nn.Linear(12, 5)", field.format(cell=cell)]
            body = ["y = self.a(x)", "B, T, _ = y.shape", *lines, "return self.e(torch.stack(out, 1))"]
            gates = {"RNNCell": 6, "GRUCell": 18, "LSTMCell": 24}[cell]
            case("writes", tokens(), f"{cell}, {name}", most={"r.weight_hh": gates})(network(own, body))
    own = ["self.a, self.c, self.e = nn.Conv2d(3, 8, 1), nn.Conv2d(20, 48, 3, padding=1), nn.Conv2d(12, 4, 1)"]
    for number in ("self.c.out_channels // 4", "self.c.in_channels - y.shape[1]", "self.e.in_channels"):
        body = ["y = self.a(x)", "B, _, H, W = y.shape", f"h = s = torch.zeros(B, {number}, H, W, dtype=y.dtype)"]
        body += ["for _ in range(2):", "    i, f, g, k = self.c(torch.cat([y, h], 1)).sigmoid().chunk(4, 1)"]
        body += ["    s = f * s + i * k", "    h = g * s.tanh()", "return self.e(h)"]
        case("writes", image(), f"ConvLSTM, {number}", most={"c.weight": 24})(network(own, body))


def _register_cached():
    """Tables that functions make when they are first called, and keep for the calls of all models."""
    cached = "self.made = __import__('functools').lru_cache(None)({made})"
    table = "lambda n, d: torch.linspace(0, 1, n * d).view(n, d)"
    own = ["self.a, self.b, self.e = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)", cached.format(made=table)]
    body = ["y = self.a(x)", "y = y + self.made(*y.shape[1:]).to(y.dtype)", "return self.e(self.b(y).relu())"]
    case("writes", tokens(), "cached positions", most={"b.weight": 6})(network(own, body))
    kernel = "lambda c: torch.linspace(0, 1, 9).view(1, 1, 3, 3).repeat(c, 1, 1, 1)"
    own = ["self.a, self.b, self.e = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)"]
    body = ["y = self.a(x)", "c = y.shape[1]", "y = F.conv2d(y, self.made(c).to(y.dtype), groups=c)"]
    body += ["return self.e(self.b(y).relu())"]
    most = {"a.weight": 4, "b.weight": 3}
    case("writes", image(), "cached kernel", most=most)(network([*own, cached.format(made=kernel)], body))


_register_cached()
_register_writes()
_register_states()
_register_units()
_register_distributions()
