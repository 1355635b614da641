"""Random programs: modules written out as Python code, with numbers held in all the ways in which code holds them.

A :class:`Program` is plain data whose ``repr`` rebuilds it. :func:`source` writes the code of its network,
:func:`build` runs that code, :func:`draw` draws a program from a random generator.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DTYPES",
    "EXAMPLES",
    "STAGES",
    "TAILS",
    "Program",
    "Stage",
    "build",
    "draw",
    "example_of",
    "fresh_input",
    "source",
]

TOKENS, FEATURES, SIDE, CLASSES = 5, 7, 6, 5
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
EXAMPLES = ("random", "random", "random", "zeros", "ones", "one")
TAILS = (
    "plain", "plain", "plain", "flat", "argmax", "threshold", "complex", "spectrum", "nan", "log", "square", "cross",
    "boxes", "aux", "tasks", "listed",
)  # fmt: skip
HOLDERS = ("literal", "attribute", "config", "dataclass", "dict", "class", "closure", "global", "default")
"""Where code may hold a number."""


@dataclass(frozen=True)
class Stage:
    """One module: a name in STAGES, how it joins the stream, and its options."""

    kind: str
    join: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A network and the request to prune it."""

    domain: str  # "image" or "tokens"
    width: int
    stages: tuple[Stage, ...]
    tail: str = "plain"
    tapped: int = 0  # the stage after which a second head reads
    example: str = "random"
    dtype: str = "float64"
    amount: float = 0.5
    scope: str = "layer"
    seed: int = 0


class Code:
    """The code of one module while it is being written."""

    def __init__(self, name: str, domain: str, oracle: bool) -> None:
        self.name, self.image, self.oracle = name, domain == "image", oracle
        self.dim = 1 if self.image else -1
        self.above: list[str] = []  # lines at the top of the file
        self.outer: list[str] = []  # lines around the class
        self.fields: list[str] = []
        self.init: list[str] = []
        self.body: list[str] = []
        self.arguments = "self, x"
        self._holders: set[str] = set()

    def number(self, name: str, value: int, how: str) -> str:
        """Hold a number somewhere and return the expression that reads it."""
        own = f"{self.name.lower()}_{name}"
        if how == "literal":
            return str(value)
        if how == "attribute":
            self.init.append(f"self.{name} = {value}")
            return f"self.{name}"
        if how == "class":
            self.fields.append(f"{name} = {value}")
            return f"self.{name}"
        if how == "closure":
            self.outer.append(f"{own} = {value}")
            return own
        if how == "global":
            self.above.append(f"{own.upper()} = {value}")
            return own.upper()
        if how == "default":
            self.arguments += f", {name}={value}"
            return name
        holder, made, entry = {
            "config": ("self.cfg", "SimpleNamespace()", f".{name}"),
            "dataclass": ("self.conf", "Config()", f".{name}"),
            "dict": ("self.opts", "{}", f'["{name}"]'),
        }[how]
        if holder not in self._holders:
            self._holders.add(holder)
            self.init.append(f"{holder} = {made}")
        self.init.append(f"{holder}{entry} = {value}")
        return f"{holder}{entry}"

    def layer(self, name: str, c: int, width: int, kernel: int = 1, rest: str = "") -> str:
        """Add a convolution or linear layer and return how it is called."""
        if self.image:
            pad = f", padding={kernel // 2}" if kernel > 1 else ""
            self.init.append(f"self.{name} = nn.Conv2d({c}, {width}, {kernel}{pad}{rest})")
        else:
            self.init.append(f"self.{name} = nn.Linear({c}, {width}{rest})")
        return f"self.{name}"

    def parameter(self, name: str, made: str) -> str:
        self.init.append(f"self.{name} = nn.Parameter({made})")
        return f"self.{name}"

    def write(self, *lines: str) -> None:
        self.body += lines

    def column(self, expression: str) -> str:
        """Return a vector of one number per channel so that it broadcasts over the features."""
        return f"{expression}[:, None, None]" if self.image else expression

    def width(self, kind: str, tensor: str, dim: int, written: str = "") -> str:
        """Return a width that the code reads; the oracle decides whether the original or the surviving one is meant."""
        if self.oracle:
            return f'WIDTH({tensor}, {dim}, "{kind} of {self.name.lower()}")'
        return written or f"{tensor}.shape[{dim}]"

    def text(self) -> str:
        fields = [f"    {line}" for line in self.fields]
        init = [f"        {line}" for line in ("super().__init__()", *self.init)]
        body = [f"        {line}" for line in self.body]
        head = [f"class {self.name}(nn.Module):", *fields, "    def __init__(self):", *init]
        return "\n".join([*self.outer, *head, f"    def forward({self.arguments}):", *body])


# Words that stages are made of

NORMS = (
    "none", "none", "batch", "group", "group module", "layer", "layer written", "rms written", "layer function",
    "normalize", "instance",
)  # fmt: skip


def norm(code: Code, kind: str, c: int, how: str, name: str = "norm") -> None:
    """Write a normalisation of ``y`` over its channels, module or written out."""
    dim, groups = code.dim, 4 if c % 4 == 0 else 2
    if kind == "batch" and code.image:
        code.init.append(f"self.{name} = nn.BatchNorm2d({c})")
        code.write(f"y = self.{name}(y)")
    elif kind == "instance" and code.image:
        code.init.append(f"self.{name} = nn.InstanceNorm2d({c}, affine=True)")
        code.write(f"y = self.{name}(y)")
    elif kind == "group module" and code.image:
        code.init.append(f"self.{name} = nn.GroupNorm({groups}, {c})")
        code.write(f"y = self.{name}(y)")
    elif kind == "group" and code.image:
        held = code.number(f"{name}_groups" if how != "attribute" else "num_groups", groups, how)
        weight, bias = code.parameter(f"{name}_w", f"torch.ones({c})"), code.parameter(f"{name}_b", f"torch.zeros({c})")
        code.write(f"y = F.group_norm(y, {held}, {weight}, {bias})")
    elif kind in ("layer", "group module", "batch", "instance") and not code.image:
        code.init.append(f"self.{name} = nn.LayerNorm({c})")
        code.write(f"y = self.{name}(y)")
    elif kind in ("layer written", "layer", "group"):
        weight = code.column(code.parameter(f"{name}_w", f"torch.ones({c})"))
        code.write(f"m = y.mean({dim}, keepdim=True)", f"v = (y - m).square().mean({dim}, keepdim=True)")
        code.write(f"y = (y - m) / torch.sqrt(v + 1e-5) * {weight}")
    elif kind == "rms written":
        weight = code.column(code.parameter(f"{name}_w", f"torch.ones({c})"))
        if how in ("literal", "closure"):  # the mean by hand, with a width of the tensor
            total = code.width("mean", "y", dim)
            code.write(f"y = y * torch.rsqrt(y.square().sum({dim}, keepdim=True) / {total} + 1e-5) * {weight}")
        else:
            code.write(f"y = y * torch.rsqrt(y.pow(2).mean({dim}, keepdim=True) + 1e-5) * {weight}")
    elif kind == "layer function":
        held = code.number(f"{name}_dim" if how != "attribute" else "dim", c, how)
        weight, bias = code.parameter(f"{name}_w", f"torch.ones({c})"), code.parameter(f"{name}_b", f"torch.zeros({c})")
        if code.image:
            code.write(f"y = F.layer_norm(y.permute(0, 2, 3, 1), ({held},), {weight}, {bias}).permute(0, 3, 1, 2)")
        else:
            code.write(f"y = F.layer_norm(y, ({held},), {weight}, {bias})")
    elif kind == "normalize":
        code.write(f"y = F.normalize(y, dim={dim})")


STATISTICS = ("none", "softmax", "layer", "l2", "norm", "max", "mean", "cumsum")


def statistic(kind: str, t: str, dim: int) -> str:
    """Return an expression that runs a statistic over the channels of a piece."""
    return {
        "none": f"{t}.relu()",
        "softmax": f"{t}.softmax({dim})",
        "layer": f"({t} - {t}.mean({dim}, keepdim=True))"
        f" / ({t}.var({dim}, keepdim=True, unbiased=False) + 1e-2).sqrt()",
        "l2": f"F.normalize({t}, dim={dim})",
        "norm": f"{t} / ({t}.norm(dim={dim}, keepdim=True) + 1e-2)",
        "max": f"{t} - {t}.amax({dim}, keepdim=True)",
        "mean": f"{t} * {t}.mean({dim}, keepdim=True).sigmoid()",
        "cumsum": f"{t}.cumsum({dim}).tanh()",
    }[kind]


def sizes(code: Code, t: str) -> str:
    """Write the sizes of a tensor into B and the rest, and return the shape after the channels."""
    code.write(f"B, C, H, W = {t}.shape" if code.image else f"B, T, C = {t}.shape")
    return "H, W" if code.image else ""


def shaped(code: Code, *channels: str) -> str:
    """Return a shape with the given sizes in place of the channels."""
    return ", ".join(["B", *channels, "H", "W"] if code.image else ["B", "T", *channels])


# Stages: each writes its code and returns how many channels it makes


def plain_layer(code: Code, c: int, *, width: int, norm_kind: str, how: str) -> int:
    code.write(f"y = {code.layer('a', c, width, 3)}(x)")
    norm(code, norm_kind, width, how)
    code.write("return y.relu()" if width % 8 else "return F.gelu(y)")
    return width


def pieces(
    code: Code, c: int, *, width: int, taken: str, count: int, stat: str, only: str, how: str, closed: bool
) -> int:
    """Take channels apart, run a statistic over each piece or one, put them together again."""
    D, size = code.dim, width // count
    code.write(f"y = {code.layer('a', c, width)}(x)")
    before = ":, " if code.image else "..., "
    if taken == "slice":
        n = code.number("first", size, how)
        code.write(f"p = [y[{before}:{n}], y[{before}{n}:]]")
    elif taken == "half":
        code.write(f"h = y.shape[{D}] // 2", f"p = [y[{before}:h], y[{before}h:]]")
    elif taken == "split":
        code.write(f"p = list(y.split({code.number('size', size, how)}, {D}))")
    elif taken == "sizes":
        n = code.number("size", size, how)
        code.write(f"p = list(y.split([{n}, {width - size}], {D}))")
    elif taken == "chunk":
        code.write(f"p = list(y.chunk({code.number('parts', count, how)}, {D}))")
    elif taken == "tensor_split":
        code.write(f"p = list(y.tensor_split({code.number('parts', count, how)}, dim={D}))")
    elif taken == "narrow":
        n = code.number("size", size, how)
        code.write(f"p = [y.narrow({D}, 0, {n}), y.narrow({D}, {n}, {width - size})]")
    elif taken in ("reshape", "unflatten"):
        sizes(code, "y")
        n = code.number("parts", count, how)
        if taken == "reshape":
            code.write(f"y = y.reshape({shaped(code, n, '-1')})")
        else:
            code.write(f"y = y.unflatten({D}, ({n}, -1))")
        inner = 2 if code.image else -1
        code.write(f"y = {statistic(stat, 'y', inner)}", f"y = y.flatten({'1, 2' if code.image else '-2'})")
    if taken not in ("reshape", "unflatten"):
        if only == "first":
            code.write(f"p[0] = {statistic(stat, 'p[0]', D)}")
        else:
            code.write(f"p = [{statistic(stat, 't', D)} for t in p]")
        code.write(f"y = torch.cat(p, {D})")
    if closed:
        code.write(f"return {code.layer('o', width, c)}(y)")
        return c
    code.write("return y")
    return width


def gated(code: Code, c: int, *, width: int, taken: str, how: str) -> int:
    """A gated unit: one half of the channels lets the other through."""
    D = code.dim
    code.write(f"y = {code.layer('a', c, 2 * width)}(x)")
    if taken == "glu":
        code.write(f"y = y.chunk(2, {D})[0] * y.chunk(2, {D})[1].sigmoid()")
    elif taken == "split":
        code.write(f"u, v = y.split({code.number('hidden', width, how)}, {D})", "y = u * v.sigmoid()")
    elif taken == "slice":
        n = code.number("hidden", width, how)
        before = ":, " if code.image else "..., "
        code.write(f"y = F.silu(y[{before}:{n}]) * y[{before}{n}:]")
    else:  # interleaved
        sizes(code, "y")
        code.write(f"y = y.reshape({shaped(code, '-1', '2')})")
        code.write("y = y[:, :, 0] * y[:, :, 1].sigmoid()" if code.image else "y = y[..., 0] * y[..., 1].sigmoid()")
    code.write(f"return {code.layer('o', width, c)}(y)")
    return c


def grouped(code: Code, c: int, *, groups: int, per: int, form: str, how: str) -> int:
    """A grouped convolution, or on tokens a product per group."""
    width = groups * per
    code.write(f"y = {code.layer('a', c, width)}(x).relu()")
    if code.image and form == "module":
        code.write(f"y = {code.layer('g', width, width, 3, f', groups={groups}')}(y)")
    elif code.image:
        held = code.number("groups", groups, how)
        weight = code.parameter("w", f"torch.randn({width}, {per}, 3, 3) * .3")
        code.write(f"y = F.conv2d(y, {weight}, None, 1, 1, 1, {held})")
    else:
        held = code.number("groups", groups, how)
        weight = code.parameter("w", f"torch.randn({groups}, {per}, {per}) * .5")
        size = "-1" if form == "module" else str(per)
        code.write("B, T, C = y.shape", f"y = y.reshape(B, T, {held}, {size})")
        code.write(f"y = torch.einsum('btgi,gij->btgj', y, {weight}).reshape(B, T, -1)")
    code.write(f"return {code.layer('o', width, c)}(y)")
    return c


def depthwise(code: Code, c: int, *, width: int, form: str, how: str) -> int:
    """A convolution of every channel by itself; on tokens along time."""
    code.write(f"y = {code.layer('a', c, width)}(x)")
    held = code.number("dim" if how == "attribute" else "channels", width, how) if form == "held" else "y.shape[1]"
    if code.image:
        weight = code.parameter("w", f"torch.randn({width}, 1, 3, 3) * .5")
        code.write(f"y = F.conv2d(y, {weight}, padding=1, groups={held}).relu()")
    else:
        weight = code.parameter("w", f"torch.randn({width}, 1, 3) * .5")
        code.write(
            "y = y.transpose(1, 2)", f"y = F.conv1d(y, {weight}, padding=1, groups={held}).transpose(1, 2).relu()"
        )
    code.write(f"return {code.layer('o', width, c)}(y)")
    return c


def shuffled(code: Code, c: int, *, groups: int, per: int, size: str, how: str) -> int:
    """A channel shuffle between two grouped layers."""
    width = groups * per
    code.write(f"y = {code.layer('a', c, width)}(x)")
    sizes(code, "y")
    held = code.number("groups", groups, how)
    each = {"-1": "-1", "literal": str(per), "divided": f"C // {held}"}[size]
    code.write(f"y = y.view({shaped(code, held, each)})")
    if code.image:
        code.write("y = y.transpose(1, 2).reshape(B, -1, H, W)")
        code.write(f"y = {code.layer('g', width, width, 3, f', groups={groups}')}(y)")
    else:
        code.write("y = y.transpose(2, 3).reshape(B, T, -1)")
    code.write(f"return {code.layer('o', width, c)}(y.relu())")
    return c


def squeezed(code: Code, c: int, *, width: int, how: str) -> int:
    """Channels weighted by what the whole picture says."""
    pooled = "x.mean((2, 3), keepdim=True)" if code.image else "x.mean(1, keepdim=True)"
    code.write(f"s = {code.layer('down', c, width)}({pooled}).relu()")
    code.write(f"return x * {code.layer('up', width, c)}(s).sigmoid()")
    return c


def dynamic(code: Code, c: int, *, width: int, how: str, form: str) -> int:
    """Kernels made from the data, one for each sample."""
    code.write(f"y = {code.layer('a', c, width)}(x).relu()")
    kernels = code.parameter("k", f"torch.randn(3, {c} * {width}) * .3")
    code.init.append(f"self.route = nn.Linear({width}, 3)")
    code.write(f"r = self.route(y.mean({'(2, 3)' if code.image else '1'})).softmax(-1)", f"k = r @ {kernels}")
    n_in, n_out = code.number("n_in", width, how), code.number("n_out", c, how)
    if code.image:
        code.write("B, C, H, W = y.shape", f"k = k.view(B * {n_out}, {n_in}, 1, 1)")
        size = "B * C" if form == "shape" else "-1"
        code.write(f"y = F.conv2d(y.reshape(1, {size}, H, W), k, groups=B)", f"return y.view(B, {n_out}, H, W)")
    else:
        code.write(f"return torch.bmm(y, k.view(y.shape[0], {n_in}, {n_out}))")
    return c


def maxout(code: Code, c: int, *, width: int, count: int, inner: bool, how: str) -> int:
    """The largest of several channels."""
    code.write(f"y = {code.layer('a', c, width * count)}(x)")
    sizes(code, "y")
    n = code.number("pool", count, how)
    order, dim = (("-1", n), 2 if code.image else -1) if inner else ((n, "-1"), 1 if code.image else -2)
    code.write(f"y = y.view({shaped(code, *order)}).amax({dim})")
    code.write(f"return {code.layer('o', width, c)}(y)")
    return c


def masked(code: Code, c: int, *, width: int, made: str, how: str) -> int:
    """A mask over the channels, made in the code."""
    code.write(f"y = {code.layer('a', c, width)}(x)")
    size = code.number("width", width, how) if made == "held" else f"y.shape[{code.dim}]"
    if made == "buffer":
        code.init.append(f'self.register_buffer("m", (torch.arange({width}) < {width // 2}).float())')
        code.write("m = self.m.to(y.dtype)")
    elif made == "arange":
        code.write(f"m = (torch.arange({size}) % 3 == 0).to(y.dtype)")
    else:
        code.write(f"d = {size}", "m = torch.zeros(d, dtype=y.dtype)", "m[: d // 2] = 1")
    code.write(f"y = y * {code.column('m')}", f"return {code.layer('o', width, c)}(y)")
    return c


def constant(code: Code, c: int, *, width: int, made: str, how: str) -> int:
    """Constants per channel that are no parameters."""
    code.write(f"y = {code.layer('a', c, width)}(x)")
    size = code.number("width", width, how) if how != "default" else f"y.shape[{code.dim}]"
    if made == "seeded":
        code.write(f"k = torch.randn({size}, generator=torch.Generator().manual_seed(3), dtype=torch.float64)")
    elif made == "linspace":
        code.write(f"k = torch.linspace(0.1, 1, {size}, dtype=torch.float64)")
    elif made == "arange":
        code.write(f"k = torch.arange({size}, dtype=torch.float64) / 4")
    else:
        code.write(f"k = torch.cat([torch.ones({size} - 3), torch.full((3,), .2)]).double()")
    code.write(f"y = y {'*' if width % 8 else '+'} {code.column('k.to(y.dtype)')}")
    code.write(f"return {code.layer('o', width, c)}(y.tanh())")
    return c


def correlated(code: Code, c: int, *, width: int, how: str, root: bool) -> int:
    """A product of two features over their channels, divided by a number made from the width."""
    u, v, D = code.layer("u", c, width), code.layer("v", c, width), code.dim
    code.write(f"u, v = {u}(x), {v}(x)")
    if how == "literal":
        d = str(width)
    elif how == "default":
        d = code.width("other", "u", D)
    else:
        d = code.width("other", "u", D, code.number("width", width, how))
    code.write(f"y = (u * v).sum({D}, keepdim=True) / {d}{' ** 0.5' if root else ''}")
    code.write(f"return {code.layer('o', 1, c)}(y)")
    return c


def embedded(code: Code, c: int, *, width: int, how: str) -> int:
    """Features scaled by the root of their width, as embeddings are."""
    code.write(f"y = {code.layer('a', c, width)}(x)")
    if how == "literal":
        d = str(width)
    elif how == "default":
        d = code.width("other", "y", code.dim)
    else:
        d = code.width("other", "y", code.dim, code.number("width", width, how))
    code.write(f"y = (y * {d} ** -0.5).tanh()", f"return {code.layer('o', width, c)}(y)")
    return c


def attention(
    code: Code, c: int, *, heads: int, head: int, shared: int, packed: str, view: str, how: str, size_how: str,
    product: str, extra: str, joined: str,
) -> int:  # fmt: skip
    """Attention over tokens, its heads read in one of many ways."""
    inner, few = heads * head, shared * head
    h, d = code.number("heads", heads, how), code.number("head_dim", head, size_how)
    code.write("B, T, _ = x.shape")
    if packed == "separate":
        code.write(f"q = {code.layer('q', c, inner)}(x)")
        code.write(f"k = {code.layer('k', c, few)}(x)", f"v = {code.layer('v', c, few)}(x)")
    else:
        code.layer("qkv", c, 3 * inner)
        if packed == "chunk":
            code.write("q, k, v = self.qkv(x).chunk(3, -1)")
        elif packed == "split":
            code.write(f"q, k, v = self.qkv(x).split({code.number('inner', inner, how)}, -1)")
        elif packed == "slices":
            code.write(
                "y = self.qkv(x)", f"q, k, v = y[..., :{inner}], y[..., {inner}:{2 * inner}], y[..., {2 * inner}:]"
            )
        elif packed == "by head":  # each head holds its own three
            code.write(f"q, k, v = self.qkv(x).view(B, T, {h}, 3 * {d}).chunk(3, -1)")
        elif packed == "joint":
            last = "-1" if view == "reshape -1" else d
            code.write(f"q, k, v = self.qkv(x).reshape(B, T, 3, {h}, {last}).unbind(2)")
    apart = packed in ("by head", "joint")
    few_heads = h if shared == heads else str(shared)
    for name, count in (("q", h), ("k", few_heads), ("v", few_heads)):
        if apart:
            code.write(f"{name} = {name}.transpose(1, 2)")
            continue
        split = {
            "reshape -1": f"reshape(B, T, {count}, -1)",
            "view -1": f"view(B, T, -1, {d})",
            "both": f"reshape(B, T, {count}, {d})",
            "unflatten": f"unflatten(-1, ({count}, -1))",
            "divided": f"reshape(B, T, {count}, {name}.shape[-1] // {count})",
            "folded": f"reshape(B, T, {count}, -1)",
        }[view]
        code.write(f"{name} = {name}.{split}.transpose(1, 2)")
    if extra == "normed":
        code.write("q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)")
    elif extra == "rms":
        w = code.parameter("qn", f"torch.ones({head})")
        code.write(f"q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-5) * {w}")
    elif extra == "rope literal":
        n = head // 2
        code.write(f"a = torch.arange(T).to(x)[:, None] / torch.arange(1, {n} + 1).to(x)")
        code.write(f"q = torch.cat([q[..., :{n}] * a.cos() - q[..., {n}:] * a.sin(), q[..., {n}:]], -1)")
    elif extra == "rope complex" and head % 2 == 0:
        code.write(f"a = torch.arange(T, dtype=torch.float64)[:, None] / torch.arange(1, {head // 2} + 1)")
        code.write("a = torch.polar(torch.ones_like(a), a)")
        code.write("q = torch.view_as_complex(q.double().reshape(*q.shape[:-1], -1, 2)) * a")
        code.write("q = torch.view_as_real(q).flatten(-2).to(x.dtype)")
    elif extra == "temperature":
        t = code.parameter("temperature", f"torch.ones({heads}, 1, 1)")
        code.write(f"q = q * {t}")
    if shared != heads:
        r = heads // shared
        if extra == "expanded":
            code.write(f"k, v = (t[:, :, None].expand(-1, -1, {r}, -1, -1).flatten(1, 2) for t in (k, v))")
        else:
            code.write(f"k, v = k.repeat_interleave({r}, 1), v.repeat_interleave({r}, 1)")
    if product == "sdpa":
        code.write("y = F.scaled_dot_product_attention(q, k, v)")
    elif product == "causal":
        code.write("y = F.scaled_dot_product_attention(q, k, v, is_causal=True)")
    else:
        scale = {
            "literal": f"{head**-0.5!r}",
            "shape": code.width("attention", "q", -1) + " ** -0.5",
            "held": (code.width("attention", "q", -1, d) if size_how != "literal" else d) + " ** -0.5",
            "none": "1.0",
        }.get(product)
        if product == "stored":
            code.init.append(f"self.scale = {head} ** -0.5")
            scale = "self.scale"
        if view == "folded":
            code.write(f"q, k, v = (t.reshape(B * {h}, T, -1) for t in (q, k, v))")
            code.write(f"y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * {scale}).softmax(-1), v)")
            code.write(f"y = y.reshape(B, {h}, T, -1)")
        else:
            code.write(f"y = (q @ k.transpose(-2, -1) * {scale}).softmax(-1) @ v")
    code.write(
        {
            "reshape": "y = y.transpose(1, 2).reshape(B, T, -1)",
            "flatten": "y = y.transpose(1, 2).flatten(2)",
            "held": f"y = y.transpose(1, 2).contiguous().view(B, T, {h} * {d})",
            "literal": f"y = y.transpose(1, 2).reshape(B, T, {inner})",
        }[joined]
    )
    code.write(f"return {code.layer('o', inner, c)}(y)")
    return c


def layered(code: Code, c: int, *, count: int, spare: int, kind: str, scale: float, how: str) -> int:
    """Equal layers in a list, a number of how many run, some that never run, and literals of the same value."""
    make = f"nn.Conv2d({c}, {c}, 1)" if code.image else f"nn.Linear({c}, {c})"
    code.init.append(f"self.layers = nn.ModuleList([{make} for _ in range({count + spare})])")
    code.init.append(f"self.n_layers = {count}")
    code.parameter("gain", f"torch.full((1,), {scale!r})")
    code.write("for i in range(self.n_layers):", "    y = self.layers[i](x)")
    if kind == "heads":
        inner = 2 if code.image else -1
        code.write("    B, C, H, W = y.shape" if code.image else "    B, T, C = y.shape")
        n = code.number("heads", count, how)
        code.write(f"    y = y.reshape({shaped(code, n, '-1')}).softmax({inner})")
        code.write(f"    y = y.flatten({'1, 2' if code.image else '-2'})")
    code.write("    x = x + self.gain * y.tanh()", "return x")
    return c


def trained(code: Code, c: int, *, width: int, form: str, how: str) -> int:
    """Code that only training runs, or that evaluation alone runs."""
    a, b = code.layer("a", c, width), code.layer("o", width, c)
    code.write(f"y = {a}(x).relu()")
    if form == "more":
        code.write(f"if self.training: y = y + {code.layer('extra', width, width)}(y)")
    elif form == "other":
        code.write(f"if self.training: y = {code.layer('extra', c, width)}(x) * y")
        code.write("else: y = y * 2")
    else:  # a number in the code, in training only
        code.write("if self.training:")
        code.write(f"    y = y.unflatten({code.dim}, ({code.number('parts', 2, how)}, -1))")
        inner = 2 if code.image else -1
        code.write(f"    y = y.softmax({inner}).flatten({'1, 2' if code.image else '-2'})")
    code.write(f"return {b}(y)")
    return c


def selected(code: Code, c: int, *, width: int, form: str, how: str) -> int:
    """A part of the samples goes another way; on the example none of them does."""
    code.parameter("shift", "torch.full((1,), 100.0)")
    pooled = f"x.mean({'(2, 3)' if code.image else '1'})"
    code.init.append(f"self.score = nn.Linear({c}, 1)")
    code.write(f"keep = (self.score({pooled}) > self.shift).squeeze(1)")
    code.write(f"y = {code.layer('a', c, width)}(x)", f"z = {code.layer('b', c, width)}(x[keep])")
    if form == "normed":
        code.write(f"z = F.normalize(z, dim={code.dim})")
    code.write("y = y.index_put((keep,), z)", f"return {code.layer('o', width, c)}(y.tanh())")
    return c


def enlarged(code: Code, c: int, *, width: int, how: str) -> int:
    """Channels that become positions, and back."""
    if not code.image:
        return gated(code, c, width=width, taken="interleaved", how=how)
    code.write(f"y = F.pixel_shuffle({code.layer('a', c, 4 * width)}(x), 2)")
    code.write(f"return F.max_pool2d({code.layer('o', width, c)}(y), 2)")
    return c


def fourier(code: Code, c: int, *, width: int, how: str) -> int:
    """Positions by their frequencies."""
    code.write(f"y = {code.layer('a', c, width)}(x)")
    if code.image:
        code.write("f = torch.fft.rfft2(y.float() if y.dtype == torch.bfloat16 else y)")
        code.write("y = y + torch.fft.irfft2(f * 0.5, s=y.shape[-2:]).to(y.dtype)")
    else:
        code.write("y = y + y.flip(1)")
    code.write(f"return {code.layer('o', width, c)}(y.relu())")
    return c


def normed(code: Code, c: int, *, norm_kind: str, how: str) -> int:
    code.write("y = x")
    norm(code, norm_kind, c, how)
    code.write(f"return {code.layer('o', c, c)}(y)")
    return c


HEADS = ((4, 2), (4, 4), (2, 4), (2, 6), (3, 4), (4, 6), (6, 2), (8, 2))
TAKEN = ("slice", "half", "split", "sizes", "chunk", "tensor_split", "narrow", "reshape", "unflatten")

# kind -> (what writes it, option -> what is drawn from)
STAGES: dict[str, tuple[Callable[..., int], dict[str, tuple[Any, ...]]]] = {
    "layer": (plain_layer, {"width": (6, 8, 12, 16), "norm_kind": NORMS}),
    "pieces": (
        pieces,
        {
            "width": (8, 12, 16),
            "taken": TAKEN,
            "count": (2, 4),
            "stat": STATISTICS,
            "only": ("first", "all"),
            "closed": (True, True, False),
        },
    ),
    "gated": (gated, {"width": (6, 8, 12), "taken": ("glu", "split", "slice", "interleaved")}),
    "grouped": (grouped, {"groups": (2, 3, 4), "per": (2, 4, 6), "form": ("module", "function")}),
    "depthwise": (depthwise, {"width": (6, 8, 12), "form": ("held", "held", "shape")}),
    "shuffled": (shuffled, {"groups": (2, 3, 4), "per": (2, 4, 6), "size": ("-1", "literal", "divided")}),
    "squeezed": (squeezed, {"width": (4, 6)}),
    "dynamic": (dynamic, {"width": (6, 8), "form": ("shape", "-1")}),
    "maxout": (maxout, {"width": (6, 8), "count": (2, 3), "inner": (True, False)}),
    "masked": (masked, {"width": (6, 8, 12), "made": ("shape", "held", "arange", "buffer")}),
    "constant": (constant, {"width": (6, 8, 12), "made": ("seeded", "linspace", "arange", "joined")}),
    "correlated": (correlated, {"width": (8, 12), "root": (True, True, False)}),
    "embedded": (embedded, {"width": (8, 12)}),
    "layered": (
        layered,
        {"count": (2, 4), "spare": (0, 0, 2), "kind": ("plain", "heads"), "scale": (1.0, 1e-6)},
    ),
    "trained": (trained, {"width": (6, 8), "form": ("more", "other", "pieces")}),
    "selected": (selected, {"width": (6, 8), "form": ("plain", "normed")}),
    "enlarged": (enlarged, {"width": (4, 6)}),
    "fourier": (fourier, {"width": (6, 8)}),
    "normed": (normed, {"norm_kind": NORMS[2:]}),
    "attention": (
        attention,
        {
            "heads and size": HEADS,
            "shared": (0, 0, 1, 2),
            "packed": ("separate", "separate", "chunk", "split", "slices", "by head", "joint"),
            "view": ("reshape -1", "view -1", "both", "unflatten", "divided", "folded"),
            "product": ("sdpa", "causal", "literal", "shape", "held", "stored", "none"),
            "size_how": HOLDERS,
            "extra": ("none",) * 3 + ("normed", "rms", "rope literal", "rope complex", "temperature", "expanded"),
            "joined": ("reshape", "flatten", "held", "literal"),
        },
    ),
}
JOINS = ("plain", "plain", "residual", "scaled", "rezero", "concat", "normed")
"""How a stage joins the stream; ``scaled`` by a LayerScale of 1e-6, ``rezero`` by a zero."""


def options_of(kind: str, r: random.Random) -> dict[str, Any]:
    """Draw the options of a stage."""
    options = {name: r.choice(values) for name, values in STAGES[kind][1].items()} | {"how": r.choice(HOLDERS)}
    if kind == "attention":
        options["heads"], options["head"] = options.pop("heads and size")
        fewer = options["shared"]  # heads of keys and values, where queries share them
        if not fewer or options["packed"] != "separate" or options["heads"] % fewer:
            options["shared"] = options["heads"]
    return options


def draw(r: random.Random, most: int = 3) -> Program:
    """Draw a program with one to ``most`` stages."""
    domain = r.choice(("image", "tokens"))
    width = r.choice((8, 12, 16))
    kinds = [kind for kind in STAGES if domain == "tokens" or kind != "attention"]
    kinds += ["pieces"] * 3 + (["attention"] * 6 if domain == "tokens" else ["layer"] * 2)
    stages = []
    for _ in range(r.randint(1, most)):
        kind = r.choice(kinds)
        stages.append(Stage(kind, r.choice(JOINS), options_of(kind, r)))
    return Program(
        domain, width, tuple(stages), r.choice(TAILS), r.randrange(len(stages)), r.choice(EXAMPLES),
        r.choice(("float64", "float32", "float32", "bfloat16")), r.choice((0.3, 0.5, 0.5, 0.75)),
        r.choice(("layer", "layer", "global")), r.randrange(1000),
    )  # fmt: skip


PRELUDE = """from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    heads: int = 0

"""


def source(program: Program, oracle: bool = False, probe: bool = False) -> str:
    """Write the code of a network: a function ``make`` that returns its class.

    Args:
        program: What to write.
        oracle: Whether widths that the code reads go through the oracle.
        probe: Whether the network returns the features that its outputs are made from, in place of the outputs.
    """
    image, width = program.domain == "image", program.width
    net = Code("Net", program.domain, oracle)
    net.init.append(
        f"self.stem = nn.Conv2d(3, {width}, 3, padding=1)" if image else f"self.stem = nn.Linear({FEATURES}, {width})"
    )
    net.body.append("x = self.stem(x)")
    made: list[Code] = []
    pooled = "x.mean((2, 3))" if image else "x.mean(1)"
    tapped = width
    for i, stage in enumerate(program.stages):
        code = Code(f"S{i}", program.domain, oracle)
        into = width
        out = STAGES[stage.kind][0](code, width, **stage.options)
        join = stage.join if out == into or stage.join == "concat" else "plain"
        call, shape = f"self.s{i}(x)", f"({out}, 1, 1)" if image else f"({out},)"
        if join == "normed":
            net.init.append(f"self.n{i} = nn.GroupNorm(1, {into})" if image else f"self.n{i} = nn.LayerNorm({into})")
            net.body.append(f"x = x + self.s{i}(self.n{i}(x))")
        elif join == "scaled":
            net.init.append(f"self.g{i} = nn.Parameter(torch.full({shape}, 1e-6))")
            net.body.append(f"x = x + self.g{i} * {call}")
        elif join == "rezero":
            net.init.append(f"self.g{i} = nn.Parameter(torch.zeros(1))")
            net.body.append(f"x = x + self.g{i} * {call}")
        elif join == "residual":
            net.body.append(f"x = x + {call}")
        elif join == "concat":
            net.body.append(f"x = torch.cat([x, {call}], {net.dim})")
        else:
            net.body.append(f"x = {call}")
        width = into + out if join == "concat" else out
        net.init.append(f"self.s{i} = S{i}()")
        made.append(code)
        if i == program.tapped and program.tail in ("aux", "tasks", "listed"):
            net.body.append(f"mid = {pooled}")
            tapped = width
    finish(net, program, width, tapped, pooled, probe)
    parts = [code.text() for code in (*made, net)]
    above = "\n".join(line for code in (*made, net) for line in code.above)
    return f"{PRELUDE}{above}\n\ndef make():\n{textwrap.indent(chr(10).join(parts), '    ')}\n    return Net\n"


def finish(net: Code, program: Program, width: int, tapped: int, pooled: str, probe: bool) -> None:
    """Write the end of the network: what it makes of the features."""
    tail, write, init = program.tail, net.body.append, net.init.append
    if tail == "boxes":
        write("x = x.flatten(2).transpose(1, 2)" if net.image else "x = x")
        init(f"self.cls = nn.Linear({width}, 1)")
        init(f"self.box = nn.Linear({width}, 4)")
        init("self.shift = nn.Parameter(torch.full((1,), 100.0))")
        write("score, box = self.cls(x).flatten(), self.box(x).reshape(-1, 4)")
        write("keep = score > self.shift")
        write("return box[keep], score[keep]" if probe else 'return {"boxes": box[keep], "scores": score[keep]}')
        return
    if tail == "flat" and net.image:
        init(f"self.head = nn.Linear({width} * {SIDE * SIDE}, {CLASSES})")
        write("z = self.head(x.flatten(1))")
    elif tail == "square":
        write(f"z = {pooled}")
    elif tail == "listed":
        init(f"self.heads = nn.ModuleList([nn.Linear({tapped}, {CLASSES}), nn.Linear({width}, {CLASSES})])")
        write(f"z = self.heads[1]({pooled})")
    else:
        init(f"self.head = nn.Linear({width}, {CLASSES})")
        write(f"z = self.head({pooled})")
    if tail == "aux":
        init(f"self.aux = nn.Linear({tapped}, {CLASSES})")
        write("if self.training: return z, self.aux(mid)")
    elif tail == "listed":
        write("if self.training: return z, self.heads[0](mid)")
    elif tail == "tasks":
        net.arguments += ", task=0"
        init(f"self.other = nn.Linear({tapped}, {CLASSES})")
        write("if task == 1: return self.other(mid)")
    outputs = {
        "argmax": "z.argmax(-1)",
        "threshold": "z > 0",
        "complex": "torch.complex(z.float(), z.float().flip(-1))",
        "spectrum": "torch.fft.rfft(z.float())",
        "nan": 'z * float("nan")',
        "log": "z.log()",
        "square": "z.square().mean()",
        "cross": "F.cross_entropy(z, torch.zeros(z.shape[0], dtype=torch.long))",
    }
    write("return z" if probe else f"return {outputs.get(tail, 'z')}")


def compiled(program: Program, oracle: bool = False, probe: bool = False, **names: Any) -> type[nn.Module]:
    """Run the code of a program and return the class of its network."""
    space: dict[str, Any] = {"__name__": "program", **names}
    exec(compile(source(program, oracle, probe), "<program>", "exec", dont_inherit=True), space)
    return space["make"]()


def build(program: Program, kind: type[nn.Module] | None = None) -> nn.Module:
    """Build the network with random weights of ordinary size, in eval mode and the program's dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(program.seed)
        model = (kind or compiled(program))()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point() and name.split(".")[-1] not in KEPT_AS_MADE:
                if not name[1:].isdigit():
                    tensor.data.uniform_(0.5, 1.5)
            elif tensor.dim() > 1 and tensor.is_floating_point() and not name[1:].isdigit():
                tensor.data.mul_(1.5)
        return model.to(DTYPES[program.dtype]).eval()


KEPT_AS_MADE = ("shift", "gain", "m")
"""Parameters and buffers whose first value is what the program is about."""


def fresh_input(program: Program, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random input of ordinary size that the example is not."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 3, SIDE, SIDE) if program.domain == "image" else (3, TOKENS, FEATURES)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def example_of(program: Program) -> Tensor:
    """Return what the program is traced on."""
    x = fresh_input(program, program.seed + 1, DTYPES[program.dtype])[:2]
    if program.example in ("zeros", "ones"):
        return getattr(torch, f"{program.example}_like")(x)
    if program.example == "one":
        return x[:1] if program.domain == "image" else x[:, :1]
    return x
