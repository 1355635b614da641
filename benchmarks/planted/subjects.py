"""The networks in whose cuts errors are planted, and the settings in which each is tried."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.surgery import Cut
from tests import models, sequences
from tests.programs import Program, Stage, build, example_of, fresh_input

Tensors = dict[str, Tensor]
Kept = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A network to cut.

    Attributes:
        name: What it is called, or what rebuilds it.
        build: Makes the model.
        example: What it is traced and proved on.
        fresh: Other inputs of ordinary size, in float64.
        program: The program it was made from, if any.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Any
    fresh: Any
    program: Program | None = None


@dataclass(frozen=True, eq=False)
class Planted:
    """A wrong cut.

    Attributes:
        kind: What was done.
        where: To which tensor or attribute.
        cut: The cut that says what is written.
        edit: What changes the slim values after that, in place.
    """

    kind: str
    where: str
    cut: Cut
    edit: Callable[[Tensors], None] | None = None

    def tensors(self, model: nn.Module) -> Tensors:
        """Make the slim values that would be written."""
        made = self.cut.tensors(model)
        if self.edit is not None:
            self.edit(made)
        return made


SLICED = {
    "width": 16, "taken": "slice", "count": 4, "stat": "layer", "only": "first", "how": "literal", "closed": True,
}  # fmt: skip
CONFIGURED = {
    "heads": 4, "head": 4, "shared": 4, "packed": "chunk", "view": "reshape -1", "product": "sdpa", "extra": "none",
    "joined": "reshape", "how": "config", "size_how": "literal",
}  # fmt: skip
LAYERED = {"count": 4, "spare": 0, "kind": "heads", "scale": 1e-6, "how": "literal"}
CASES: dict[str, Program] = {
    "group norm as a function": Program(
        "image", 16, (Stage("layer", options={"width": 16, "norm_kind": "group", "how": "attribute"}),)
    ),
    "literal slice and a statistic": Program("image", 16, (Stage("pieces", options=SLICED),)),
    "heads in a config": Program("tokens", 16, (Stage("attention", "scaled", CONFIGURED),)),
    "another attribute of equal value": Program("tokens", 16, (Stage("layered", options=LAYERED),)),
    "a detector without detections": Program(
        "image", 16, (Stage("layer", options={"width": 16, "norm_kind": "none", "how": "literal"}),), tail="boxes"
    ),
    "a sibling that did not run": Program(
        "image", 16, (Stage("layer", options={"width": 16, "norm_kind": "none", "how": "literal"}),), tail="tasks"
    ),
    "heads that training runs": Program(
        "tokens", 16, (Stage("layer", options={"width": 16, "norm_kind": "none", "how": "literal"}),), tail="listed"
    ),
    "a branch of training": Program(
        "image", 16, (Stage("trained", options={"width": 8, "form": "more", "how": "literal"}),)
    ),
    "kernels made from data": Program(
        "image", 12, (Stage("dynamic", options={"width": 8, "form": "shape", "how": "attribute"}),)
    ),
}  # fmt: skip
"""Programs in which cuts were once wrong."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class GPT(nn.Module):
    """A transformer over tokens, initialised as GPT-2 is: normal weights of 0.02, smaller ones on the residual path."""

    def __init__(self, depth: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, width), nn.Embedding(16, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, 50, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = "c_proj" in name or ".2.weight" in name
                nn.init.normal_(parameter, 0.0, 0.02 / (2 * depth) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.lm_head(self.ln_f(x))


def scaled(program: Program) -> Program:
    """Join every stage that can by a LayerScale of 1e-6."""
    return dataclasses.replace(program, stages=tuple(dataclasses.replace(s, join="scaled") for s in program.stages))


def tailed(*tails: str) -> Callable[[Program], Program]:
    return lambda program: dataclasses.replace(program, tail=tails[program.seed % len(tails)])


def as_dtype(dtype: str) -> Callable[[Program], Program]:
    return lambda program: dataclasses.replace(program, dtype=dtype)


SETTINGS: dict[str, Callable[[Program], Program]] = {
    "float32": as_dtype("float32"),
    "bfloat16": as_dtype("bfloat16"),
    "float64": as_dtype("float64"),
    "LayerScale 1e-6": scaled,
    "integers": tailed("argmax", "threshold"),
    "loss alone": tailed("square", "cross"),
    "no numbers": tailed("nan", "complex"),
}
GPT_SETTING = "GPT-2 init"


def subject_of(program: Program, name: str = "") -> Subject:
    return Subject(name or repr(program), lambda: build(program), example_of(program), fresh_input(program, 5), program)


def networks(dtype: torch.dtype) -> Iterator[Subject]:
    """Yield the small networks of the tests."""
    for name, net in models.NETS.items():
        inputs = cast(net.inputs, dtype)
        yield Subject(name, lambda b=net.build: lively(seeded(b)).to(dtype).eval(), inputs, renewed(net.inputs))
    for name, sequence in sequences.ATTENTION.items():
        make = lambda b=sequence.build: lively(seeded(b)).to(dtype).eval()  # noqa: E731
        yield Subject(name, make, cast(sequences.TOKENS, dtype), renewed(sequences.TOKENS))
    for name, recurrent in sequences.RECURRENT.items():
        make = lambda b=recurrent: lively(seeded(b)).to(dtype).eval()  # noqa: E731
        yield Subject(name, make, cast(sequences.TOKENS, dtype), renewed(sequences.TOKENS))


def gpts() -> Iterator[Subject]:
    """Yield fresh transformers, shallow and deep."""
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    fresh = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(2))
    for depth, dtype in itertools.product((2, 12), (torch.float32, torch.bfloat16)):
        make = lambda d=depth, t=dtype: seeded(lambda: GPT(d)).to(t).eval()  # noqa: E731
        yield Subject(f"GPT of {depth} layers, {str(dtype)[6:]}", make, tokens, fresh)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def lively(model: nn.Module) -> nn.Module:
    """Give vectors that start as zeros or ones random entries: among equal ones no error shows."""
    generator = torch.Generator().manual_seed(4)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point() and torch.equal(tensor, tensor[:1].expand_as(tensor)):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    return mapped(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)


def renewed(inputs: Any) -> Any:
    generator = torch.Generator().manual_seed(9)

    def other(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64) if t.is_floating_point() else t

    return mapped(inputs, other)


def mapped(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, dict):
        return {key: mapped(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(mapped(value, function) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else inputs
