"""Writes the code of a module, with its numbers held in one of the ways in which code holds numbers."""

from __future__ import annotations

__all__ = ["HOLDERS", "NORMS", "STATISTICS", "Code", "norm", "shaped", "sizes", "statistic"]

HOLDERS = ("literal", "attribute", "config", "dataclass", "dict", "class", "closure", "global", "default")
"""Where code may hold a number."""


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
