"""Attention of random programs, whose heads are read in one of many ways."""

from __future__ import annotations

from tests.program_code import Code

__all__ = ["attention"]


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
        code.write("q = torch.view_as_complex(q.to(torch.float64, copy=True).reshape(*q.shape[:-1], -1, 2)) * a")
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
