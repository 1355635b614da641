"""Modules of random programs on images and tokens: each writes its code and returns how many channels it makes."""

from __future__ import annotations

from tests.program_code import Code, norm, shaped, sizes, statistic

__all__ = [
    "constant",
    "correlated",
    "depthwise",
    "dynamic",
    "embedded",
    "enlarged",
    "fourier",
    "gated",
    "grouped",
    "layered",
    "masked",
    "maxout",
    "normed",
    "pieces",
    "plain_layer",
    "selected",
    "shuffled",
    "squeezed",
    "trained",
]


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
