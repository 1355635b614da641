"""What pruning costs and saves on a GPU: ``python -m benchmarks.gpu`` writes gpu.json, with the card's name.

ResNet-50, ViT-B and a language model like Llama with one billion weights, dense and with half of their FLOPs; 2:4
kernels; masks, Taylor scores, second-order solvers, and the cut itself. It was written for eight minutes, and has not
run on a GPU yet. ``--device cpu --small`` runs the same code on small models.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune import hold_masks, prune_filters, prune_weights
from lightning_prune.algorithms.solvers import SOLVERS
from lightning_prune.pruning.scoring import accumulate, accumulator_for
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery.semi_structured import to_semi_structured_

OUT = Path(__file__).with_name("gpu.json")
CLASSES = 1000


class Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al. 2016)."""

    def __init__(self, entering: int, width: int, stride: int):
        super().__init__()
        leaving = 4 * width
        self.reduce, self.norm1 = nn.Conv2d(entering, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.norm3 = nn.Conv2d(width, leaving, 1, bias=False), nn.BatchNorm2d(leaving)
        self.shortcut = nn.Sequential()
        if entering != leaving or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.BatchNorm2d(leaving))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.reduce(x)))
        y = self.norm3(self.expand(F.relu(self.norm2(self.conv(y)))))
        return F.relu(y + self.shortcut(x))


def resnet50(small: bool) -> nn.Module:
    """ResNet-50, or one of an eighth of its width with a block per stage."""
    first, depths = (8, (1, 1, 1, 1)) if small else (64, (3, 4, 6, 3))
    layers: list[nn.Module] = [nn.Conv2d(3, first, 7, 2, 3, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    entering = first
    for stage, depth in enumerate(depths):
        for block in range(depth):
            layers.append(Bottleneck(entering, first << stage, 2 if stage and not block else 1))
            entering = 4 * (first << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(entering, CLASSES))


class VisionTransformer(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021), with the mean of its tokens in place of a class token."""

    def __init__(self, small: bool):
        super().__init__()
        width, depth, heads = (64, 2, 4) if small else (768, 12, 12)
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 196, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class LlamaLayer(nn.Module):
    """RMSNorm, grouped-query attention and a gated feed-forward part (Touvron et al. 2023), without rotation."""

    def __init__(self, width: int, heads: int, shared: int, hidden: int):
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, shared * self.size, bias=False)
        self.value = nn.Linear(width, shared * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query, key, value = [part(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self._projections()]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value


class Llama(nn.Module):
    """A language model with one billion weights, like Llama 3.2 1B; logits of the last token."""

    def __init__(self, small: bool):
        super().__init__()
        width, depth, heads, shared, hidden, self.words = (64, 2, 4, 2, 128, 100) if small else (
            2048, 16, 32, 8, 8192, 32000
        )  # fmt: skip
        self.embedding = nn.Embedding(self.words, width)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, shared, hidden) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, self.words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, -1])


def inputs(name: str, batch: int, small: bool, device: str, dtype: torch.dtype) -> Tensor:
    """A batch for a model: images, or 128 tokens a row."""
    if name == "llama-1b":
        return torch.randint(100, (batch, 16 if small else 128), device=device)
    return torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)


MODELS: dict[str, Callable[[bool], nn.Module]] = {"resnet50": resnet50, "vit-b": VisionTransformer, "llama-1b": Llama}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str, limit: float) -> float:
    """Median time of a call, after three that are not counted; calls repeat until ``limit`` seconds are over."""
    for _ in range(3):
        call()
    synchronize(device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < limit and len(times) < 200):
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def once(call: Callable[[], object], device: str) -> float:
    """Time of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def latencies(name: str, device: str, small: bool, limit: float) -> dict[str, object]:
    """Cut half of a model's FLOPs, and measure the cut and the calls of both models."""
    torch.manual_seed(0)
    dense = MODELS[name](small).to(device).eval()
    slim = copy.deepcopy(dense)
    example = inputs(name, 1, small, device, torch.float32)
    cut: dict[str, float] = {}
    cut["trace"] = once(lambda: find_structure(trace(slim, example)), device)
    cut["prune"] = once(
        lambda: prune_filters(slim, example, 0.5, target="flops", round_to=8, progress=False), device
    )  # trace, choice, proof and cut
    found: dict[str, object] = {
        "params": [sum(p.numel() for p in model.parameters()) for model in (dense, slim)],
        "seconds of a cut": cut,
    }
    dtypes = (torch.bfloat16,) if device == "cpu" else (torch.float16, torch.bfloat16)
    for dtype in dtypes:
        dense, slim = dense.to(dtype), slim.to(dtype)
        for batch in (1, 2) if small else (1, 64):
            x = inputs(name, batch, small, device, dtype)
            with torch.inference_mode():
                pair = [seconds(lambda model=model, x=x: model(x), device, limit) for model in (dense, slim)]
            found[f"{str(dtype).removeprefix('torch.')}, batch {batch}"] = {
                "dense ms": 1e3 * pair[0], "slim ms": 1e3 * pair[1], "speed-up": pair[0] / pair[1]
            }  # fmt: skip
    return found


def overheads(device: str, small: bool, limit: float) -> dict[str, float]:
    """Share that masks and Taylor scores add to a training step of ResNet-50."""
    torch.manual_seed(0)
    model = resnet50(small).to(device)
    x = inputs("resnet50", 2 if small else 32, small, device, torch.float32)
    labels = torch.randint(CLASSES, (len(x),), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def step() -> None:
        optimizer.zero_grad()
        loss(model, (x, labels)).backward()
        optimizer.step()

    plain = seconds(step, device, limit)
    structure = find_structure(trace(model, x[:1]))
    forms = ("taylor", "taylor_activations")
    scored = {}
    for form in forms:

        def score(form: str = form) -> None:
            accumulate(accumulator_for(form), model, structure, [(x, labels)], loss)

        scored[f"seconds of {form} scores of a batch, by those of a step"] = seconds(score, device, limit) / plain
    prune_weights(model, 0.9, optimizer=optimizer)
    with hold_masks(model, optimizer):
        masked = seconds(step, device, limit)
    return {"seconds of a step": plain, "masks, share added": masked / plain - 1, **scored}


def solvers(device: str, small: bool) -> dict[str, dict[str, float]]:
    """Time of the second-order solvers on one layer, and the rate of their products with the Hessian."""
    size = 64 if small else 1024
    torch.manual_seed(0)
    dtype = torch.float64
    x = torch.randn(size, 4 * size, device=device, dtype=dtype)
    hessian = x @ x.T / x.shape[1] + 0.01 * torch.eye(size, device=device, dtype=dtype)
    weights = torch.randn(1, size, size, device=device, dtype=dtype)
    found = {}
    for name, solver in SOLVERS.items():
        if name == "exact" and not small:  # greedy, a weight at a time: for smaller layers
            continue

        def solve(solver=solver) -> None:
            solver(weights, hessian[None]).solve(weights.numel() // 2)

        taken = once(solve, device)
        # One Cholesky factorization and one product of the weights with the Hessian are the least that all need.
        least = size**3 / 3 + 2 * size**3
        found[name] = {"seconds": taken, "least GFLOP/s": least / taken / 1e9}
    return found


def sparse_kernels(small: bool, limit: float) -> dict[str, float]:
    """Speed of 2:4 kernels beside dense ones in float16, on one linear layer."""
    size = 512 if small else 4096
    torch.manual_seed(0)
    layer = nn.Linear(size, size).cuda().half().eval()
    x = torch.randn(size, size, device="cuda", dtype=torch.float16)
    prune_weights(layer, pattern="2:4")
    with torch.inference_mode():
        dense = seconds(lambda: layer(x), "cuda", limit)
    faster = to_semi_structured_(layer).faster
    with torch.inference_mode():
        sparse = seconds(lambda: layer(x), "cuda", limit)
    return {"layers on sparse kernels": len(faster), "dense ms": 1e3 * dense, "2:4 ms": 1e3 * sparse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small models, to try the code")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device; nothing was measured. --device cpu --small tries the code.")
        return
    device, small, limit = options.device, options.small, 0.2 if options.small else 1.5
    begin = time.perf_counter()
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found: dict[str, object] = {"card": card, "torch": torch.__version__, "small": small}
    for name in MODELS:
        found[name] = latencies(name, device, small, limit)
        print(name, json.dumps(found[name], indent=1), flush=True)
    found["training"] = overheads(device, small, limit)
    found["solvers"] = solvers(device, small)
    if device == "cuda":
        found["2:4"] = sparse_kernels(small, limit)
    found["seconds in all"] = time.perf_counter() - begin
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
