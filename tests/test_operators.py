"""Operators in the middle of a network: what leaves is what the operator, on the channels that stay, says by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import PruningError, prune_filters
from lightning_prune.structure import tracer
from tests.silencing import assert_equal_to_rounding

CHANNELS = 12
Operator = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A convolution to twelve channels, an operator, and a convolution from twelve channels."""

    def __init__(self, operator: Operator):
        super().__init__()
        self.a, self.o = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 1)
        self.operator = operator

    def enters(self, x: Tensor) -> Tensor:
        return F.silu(self.a(x)) + 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.operator(self.enters(x)))


def pruned(operator: Operator, **how):
    """Return the full and the slim model, what is kept, and the report."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    full, slim = Between(operator).double().eval(), Between(operator).double().eval()
    slim.load_state_dict(full.state_dict())
    report = prune_filters(slim, x, amount=0.5, criterion="random", progress=False, **how)
    return full, slim, x, report


def positions(y: Tensor) -> Tensor:
    """Indices along the positions of ``y``, the same for every channel."""
    return torch.arange(y.shape[-1]).flip(0).expand_as(y)


def rows(y: Tensor) -> Tensor:
    """``(N, C, H, W) -> (H W, N C)``, as graph networks hold nodes and features."""
    return y.permute(2, 3, 0, 1).reshape(64, -1)


def images(r: Tensor, y: Tensor) -> Tensor:
    return r.view(8, 8, y.shape[0], y.shape[1]).permute(2, 3, 0, 1)


TO = torch.arange(64) * 7 % 10  # where each node sends its message


def by_nodes(send: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator on rows of nodes, of which some ten take what all of them send."""

    def operator(y: Tensor) -> Tensor:
        r = rows(y)
        received = send(r.new_zeros(10, r.size(1)), r)
        return images(r + received[TO], y)

    return operator


def sparse(y: Tensor) -> Tensor:
    graph = torch.sparse_coo_tensor(torch.stack([torch.arange(64), TO]), torch.ones(64, dtype=y.dtype), (64, 64))
    return images(torch.sparse.mm(graph, rows(y)), y)


def definite(y: Tensor) -> Tensor:
    return y @ y.mT + torch.eye(8, dtype=y.dtype)


def looked_at(y: Tensor) -> Tensor:
    theta = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.9, 0.1]], dtype=y.dtype).expand(y.shape[0], 2, 3)
    return F.grid_sample(y, F.affine_grid(theta, [y.shape[0], 1, 8, 8], align_corners=False), align_corners=False)


def target(y: Tensor) -> Tensor:
    return y * 0.5 + 0.2


PASSING: dict[str, Operator] = {
    "fft": lambda y: torch.fft.fft(y, dim=2).real,
    "ifft": lambda y: torch.fft.ifft(y, dim=3).imag,
    "rfft, irfft": lambda y: torch.fft.irfft(torch.fft.rfft(y) * 0.5, n=8),
    "rfft2, irfft2": lambda y: torch.fft.irfft2(torch.fft.rfft2(y), s=(8, 8)),
    "fft2": lambda y: torch.fft.fft2(y).abs(),
    "fftn over positions": lambda y: torch.fft.fftn(y, dim=(2, 3)).real,
    "hfft": lambda y: torch.fft.hfft(y, n=8),
    "ihfft": lambda y: torch.fft.ihfft(y).real,
    "fftshift": lambda y: torch.fft.fftshift(y, dim=(2, 3)),
    "view_as_complex, view_as_real": lambda y: torch.view_as_real(
        torch.view_as_complex(y.reshape(*y.shape[:3], 4, 2)) * 1j
    ).flatten(3),
    "polar": lambda y: torch.polar(y.abs(), y).real,
    "complex": lambda y: torch.complex(y, y.flip(3)).abs(),
    "scatter": lambda y: torch.zeros_like(y).scatter(3, positions(y), y),
    "scatter_add": lambda y: torch.zeros_like(y).scatter_add(2, torch.zeros_like(y).long(), y),
    "scatter_reduce": lambda y: torch.zeros_like(y).scatter_reduce(3, positions(y), y, "amax"),
    "scatter_": lambda y: torch.zeros_like(y).scatter_(3, positions(y), y),
    "scatter_add_ of nodes": by_nodes(lambda z, r: z.scatter_add_(0, TO.view(-1, 1).expand_as(r), r)),
    "scatter_reduce_ of nodes": by_nodes(lambda z, r: z.scatter_reduce_(0, TO.view(-1, 1).expand_as(r), r, "mean")),
    "index_add of nodes": by_nodes(lambda z, r: z.index_add(0, TO, r)),
    "index_add_ of nodes": by_nodes(lambda z, r: z.index_add_(0, TO, r)),
    "index_put_ of nodes": by_nodes(lambda z, r: z.index_put_((TO,), r, accumulate=True)),
    "index_reduce_ of nodes": by_nodes(lambda z, r: z.index_reduce_(0, TO, r, "amax")),
    "sparse.mm": sparse,
    "index_copy": lambda y: torch.zeros_like(y).index_copy(2, torch.arange(8).flip(0), y),
    "index_fill": lambda y: y.index_fill(2, torch.tensor([1, 5]), 0.5),
    "gather": lambda y: y.gather(3, positions(y)),
    "take_along_dim": lambda y: y.take_along_dim(positions(y), 3),
    "cdist": lambda y: torch.cdist(y, y.flip(2)),
    "cholesky": lambda y: torch.linalg.cholesky(definite(y)),
    "inv": lambda y: torch.linalg.inv(definite(y)),
    "pinv": lambda y: torch.linalg.pinv(y),
    "solve": lambda y: torch.linalg.solve(definite(y), y),
    "qr": lambda y: torch.linalg.qr(y + torch.eye(8, dtype=y.dtype))[1].abs(),
    "svdvals": lambda y: y * torch.linalg.svdvals(y).unsqueeze(-1),
    "eigvalsh": lambda y: y * torch.linalg.eigvalsh(definite(y)).unsqueeze(-1),
    "matrix_exp": lambda y: torch.linalg.matrix_exp(y * 0.1),
    "slogdet": lambda y: y * torch.linalg.slogdet(definite(y))[1][..., None, None],
    "solve_triangular": lambda y: torch.linalg.solve_triangular(definite(y).triu(), y, upper=True),
    "mse_loss": lambda y: F.mse_loss(y, target(y), reduction="none"),
    "l1_loss": lambda y: F.l1_loss(y, target(y), reduction="none"),
    "smooth_l1_loss": lambda y: F.smooth_l1_loss(y, target(y), reduction="none"),
    "huber_loss": lambda y: F.huber_loss(y, target(y), reduction="none"),
    "binary_cross_entropy": lambda y: F.binary_cross_entropy(y.sigmoid(), target(y).sigmoid(), reduction="none"),
    "binary_cross_entropy_with_logits": lambda y: F.binary_cross_entropy_with_logits(
        y, target(y).sigmoid(), reduction="none"
    ),
    "kl_div": lambda y: F.kl_div(y.abs().log(), target(y).abs(), reduction="none"),
    "soft_margin_loss": lambda y: F.soft_margin_loss(y, target(y).detach().sign(), reduction="none"),
    "fake_quantize": lambda y: torch.fake_quantize_per_tensor_affine(y.float(), 0.1, 0, 0, 255).double(),
    "grid_sample": looked_at,
    "interpolate": lambda y: F.interpolate(y, size=(5, 6), mode="bicubic"),
    "unfold, fold": lambda y: F.fold(F.unfold(y, 3), (8, 8), 3),
    "padded unfold, fold": lambda y: F.fold(F.unfold(y, 3, padding=1), (8, 8), 3, padding=1),
    "unfold along positions": lambda y: y.unfold(3, 3, 1).amax(-1),
    "normalize positions": lambda y: F.normalize(y, dim=3),
    "expand_as": lambda y: y - y.mean((2, 3), keepdim=True).expand_as(y),
    "expand": lambda y: y * torch.ones(1, 1, 8, 8, dtype=y.dtype).expand(y.shape[0], y.shape[1], 8, 8),
    "expand of one mask": lambda y: y * y.new_ones(1, 1, 8, 8).expand(-1, y.size(1), 8, 8),
    "broadcast_to": lambda y: y * torch.broadcast_to(torch.ones(8, dtype=y.dtype), y.shape),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, torch.rand(8, dtype=y.dtype))[0] * 2,
    "repeat": lambda y: y * torch.full((1, 1, 8, 8), 0.5, dtype=y.dtype).repeat(1, y.shape[1], 1, 1),
    "lerp": lambda y: torch.lerp(y, target(y), 0.3),
    "where": lambda y: torch.where(y > 0.1, y, target(y)),
    "cumsum": lambda y: y.cumsum(2),
    "logcumsumexp": lambda y: y.logcumsumexp(3),
    "cummax": lambda y: y.cummax(3)[0],
    "sort": lambda y: y.sort(2)[0],
    "topk": lambda y: y.topk(4, dim=2)[0],
    "kthvalue": lambda y: y * y.kthvalue(3, dim=2, keepdim=True)[0],
    "median": lambda y: y * y.median(3, keepdim=True)[0],
    "renorm": lambda y: torch.renorm(y, 2, 1, 3.0),
    "roll": lambda y: y.roll(3, 2),
    "flip": lambda y: y.flip(2),
    "diff": lambda y: y.diff(dim=3),
    "trace of each": lambda y: y * y.diagonal(dim1=2, dim2=3).sum(-1)[..., None, None],
    "cross": lambda y: torch.linalg.cross(y[..., :3], y[..., 3:6], dim=3),
    "einsum of positions": lambda y: torch.einsum("nchw,nchv->ncwv", y, y),
    "instance_norm": lambda y: F.instance_norm(y),
    "cat with nothing": lambda y: torch.cat([y, y.new_zeros(y.shape[0], 0, 8, 8)], 1),
    "cat with nothing at all": lambda y: torch.cat([torch.zeros(0, dtype=y.dtype), y], 1),
    "cat of positions with nothing": lambda y: torch.cat([y, y.new_zeros(*y.shape[:2], 0, 8)], 2),
    "lp_pool": lambda y: F.lp_pool2d(y.abs(), 2, 2),
}  # fmt: skip
"""Operators that work on each channel by itself: selecting channels before one and after it gives the same."""


@pytest.mark.parametrize("name", PASSING)
def test_channels_pass_operators_that_keep_them_apart(name):
    """The slim model computes what the operator gives on all channels, of which those kept go on."""
    full, slim, x, report = pruned(PASSING[name])
    kept = report.kept["o.weight"][1]
    assert kept.numel() == CHANNELS // 2 == slim.a.out_channels, report.pinned
    by_hand = F.conv2d(full.operator(full.enters(x))[:, kept], full.o.weight[:, kept], full.o.bias)
    assert_equal_to_rounding(slim(x), by_hand, 1e-6 if name == "fake_quantize" else 1e-11)


STATISTICS: dict[str, Operator] = {
    "normalize": lambda y: F.normalize(y, dim=1),
    "norm, expand_as": lambda y: y / y.norm(dim=1, keepdim=True).expand_as(y),
    "norm, expand": lambda y: y / y.norm(dim=1, keepdim=True).expand(-1, y.size(1), -1, -1),
    "softmax": lambda y: y.softmax(1),
    "layer_norm": lambda y: F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2),
    "rms_norm": lambda y: F.rms_norm(y.permute(0, 2, 3, 1), (y.shape[1],)).permute(0, 3, 1, 2),
    "group_norm of one": lambda y: F.group_norm(y, 1),
    "group_norm of a literal": lambda y: F.group_norm(y, 3),
    "mse_loss": lambda y: y * F.mse_loss(y, target(y)),
    "huber_loss": lambda y: y * F.huber_loss(y, target(y), reduction="sum"),
    "binary_cross_entropy": lambda y: y * F.binary_cross_entropy(y.sigmoid(), target(y).sigmoid()),
    "soft_margin_loss": lambda y: y * F.soft_margin_loss(y, target(y).detach().sign()),
    "channel_shuffle": lambda y: F.channel_shuffle(y, 3),
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "cdist between channels": lambda y: (torch.cdist(y.flatten(2), y.flatten(2)) @ y.flatten(2)).view_as(y),
    "logsumexp": lambda y: y - y.logsumexp(1, keepdim=True),
    "max and its unused places": lambda y: y - torch.max(y, 1, keepdim=True)[0],
    "min and its unused places": lambda y: y - y.min(1, keepdim=True).values,
    "CBAM": lambda y: y * torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1).sum(1, keepdim=True),
    "var_mean": lambda y: (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-3).sqrt(),
}
"""Operators that take a statistic over channels, or deal them out: they do so over the channels that stay."""


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_run_over_the_channels_that_stay(name):
    """The slim model computes what the operator gives on the channels kept, and counts in the code stay right."""
    full, slim, x, report = pruned(STATISTICS[name])
    made, read = report.kept["a.weight"][0], report.kept["o.weight"][1]
    assert made.numel() == CHANNELS // 2 == read.numel(), report.pinned
    by_hand = F.conv2d(full.operator(full.enters(x)[:, made]), full.o.weight[:, read], full.o.bias)
    assert_equal_to_rounding(slim(x), by_hand, 1e-11)


MIXING: dict[str, tuple[Operator, str]] = {
    "fft of channels": (lambda y: torch.fft.fft(y, dim=1).real, "_fft_r2c"),
    "rfftn with channels": (lambda y: torch.fft.fftn(y, dim=(1, 2)).real, "_fft_c2c"),
    "cumsum": (lambda y: y.cumsum(1), "cumsum"),
    "sort": (lambda y: y.sort(1)[0], "sort"),
    "roll": (lambda y: y.roll(1, 1), "fixed numbers"),
    "put": (lambda y: y.put(torch.arange(20), torch.zeros(20, dtype=y.dtype)), "aten.put"),
    "take": (lambda y: y * y.take(torch.arange(8)), "aten.take"),
    "masked_scatter": (lambda y: y.masked_scatter(y > 0, y.flip(3)), "aten.masked_scatter"),
    "svdvals over channels": (
        lambda y: y * torch.linalg.svdvals(y.flatten(2)).prod(1)[:, None, None, None], "_linalg_svd"
    ),
    "scatter to channels": (
        lambda y: torch.zeros_like(y).scatter(1, torch.arange(12).flip(0)[None, :, None, None].expand_as(y), y),
        "aten.scatter",
    ),
    "view_as_complex of channels": (
        lambda y: torch.view_as_real(
            torch.view_as_complex(y.permute(0, 2, 3, 1).reshape(-1, 2)) * 1j).view(2, 8, 8, 12).permute(0, 3, 1, 2),
        "",
    ),
    "gather at the largest": (lambda y: y * y.gather(1, y.max(1, keepdim=True)[1]), "the place of its largest"),
    "the smallest, as a number": (lambda y: y * y.min(1, keepdim=True)[1].double(), "the place of its largest"),
    "the largest, read": (lambda y: y * y.mean((0, 2, 3)).max(0)[1].item(), "the place of its largest"),
    "the largest, listed": (lambda y: y * y.mean((0, 2, 3)).max(0, keepdim=True)[1].tolist()[0], "the place of its"),
    "layer_norm of a literal": (
        lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2), "a number in the code"
    ),
    "depthwise of a literal": (
        lambda y: F.conv2d(y, torch.ones(12, 1, 1, 1, dtype=y.dtype), groups=12), ""
    ),
    "zeros of a literal": (lambda y: torch.zeros(2, 12, 8, 8, dtype=y.dtype).scatter_add(3, positions(y), y), ""),
    "local_response_norm": (lambda y: F.local_response_norm(y, 3), ""),
}  # fmt: skip
"""Operators that mix channels, or whose code has a literal for their number, and what the reason names."""


@pytest.mark.parametrize("name", MIXING)
def test_channels_stay_where_operators_mix_them(name):
    """Where a smaller operator would compute something else, all channels stay, and the reason names it."""
    operator, told = MIXING[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    beside = nn.Sequential(nn.Conv2d(3, 6, 1), nn.SiLU(), nn.Conv2d(6, 3, 1), Between(operator)).double().eval()
    report = prune_filters(beside, x, amount={"0": 0.5}, progress=False)
    everything = prune_filters(beside, x, amount=0.3, target="params", progress=False)
    assert report.kept["0.weight"][0].numel() == 3 and 0 not in everything.kept.get("3.a.weight", {})
    reasons = [pin.reason for pin in everything.pinned if pin.tensor == "3.a.weight"]
    assert reasons and told in reasons[0]


def test_places_that_are_returned_stay():
    """A model that returns which channel is largest keeps all of them, whatever else it returns."""

    class Largest(Between):
        def forward(self, x):
            return super().forward(x), self.enters(x).max(1)[1]

    torch.manual_seed(0)
    with pytest.raises(PruningError, match="a.weight: reaches the model's output"):
        prune_filters(Largest(lambda y: y), torch.randn(2, 3, 8, 8), amount=0.5)


@pytest.mark.parametrize("operator", tracer._FOR_EACH, ids=lambda operator: operator.__name__)
def test_lists_of_tensors_are_written_one_by_one(operator):
    """What a trace runs in place of an operator on lists does the same to each tensor, and returns the same."""
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.rand(3, 3, generator=generator) + 1 for _ in range(2)] for _ in range(2))
    tried = 0
    with_numbers = ((first, 2), (first, 0.5), (first, [0.5, 0.2]), (first, second, 0.5))
    for args in ((first,), (first, second), (first, second, second), *with_numbers):
        own, other = copy.deepcopy(args), copy.deepcopy(args)
        try:
            expected = operator(*own)
        except (RuntimeError, TypeError):  # it does not take these
            continue
        found = tracer._one_by_one(tracer._FOR_EACH[operator], other, {})
        torch.testing.assert_close((found, other), (list(expected or found), own), equal_nan=True)
        tried += 1
    assert tried
