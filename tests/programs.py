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

from tests.program_attention import attention
from tests.program_code import HOLDERS, NORMS, STATISTICS, Code
from tests.program_stages import (
    constant,
    correlated,
    depthwise,
    dynamic,
    embedded,
    enlarged,
    fourier,
    gated,
    grouped,
    layered,
    masked,
    maxout,
    normed,
    pieces,
    plain_layer,
    selected,
    shuffled,
    squeezed,
    trained,
)

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
