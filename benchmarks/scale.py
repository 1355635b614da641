"""Measures how time and memory grow with the size of a model, and fits exponents, beside torch-pruning where it can.

    python -m benchmarks.scale                            # all tables
    python -m benchmarks.scale --only chains weights      # some of them
    python -m benchmarks.scale --largest 500              # global thresholds up to 500 million weights

Every figure is of a process of its own: seconds are of its CPU, by one thread, and memory is the highest resident one
during the call, less what the process held before it, model included. A smaller call of the same kind warms up. An
exponent is the slope of a least-squares line through the logarithms of all sizes of a row. Writes ``scale.json`` and
``scale.png`` beside this file; what is measured anew replaces what is there.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib
import io
import json
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # where torchvision was built for another device; before Lightning imports it
    importlib.import_module("torchvision_cpu")

from benchmarks.structure import chain
from lightning_prune import prune_filters, prune_obs, prune_weights
from lightning_prune.analysis.criterion_comparison import compare_criteria
from lightning_prune.pruning.scoring import score_units
from lightning_prune.surgery import find_groups

RESULTS = Path(__file__).with_suffix(".json")
OURS, THEIRS = "ours", "torch-pruning"
GIVEN_UP = 600  # seconds after which a process is stopped
Prepared = tuple[Callable[[], object], int]
"""What is measured, and the bytes that its memory is compared with."""


class Row(NamedTuple):
    """One way to grow.

    Attributes:
        table: The table that it belongs to.
        size: What its sizes count.
        sizes: From small to large.
        prepare: From a size and the name of a library to the call.
        libraries: Whose.
        goal: The exponent of time that it is to keep to, if any.
    """

    table: str
    size: str
    sizes: tuple[int, ...]
    prepare: Callable[[int, str], Prepared]
    libraries: tuple[str, ...] = (OURS,)
    goal: float | None = None


class Residual(nn.Module):
    """A convolution with BatchNorm beside what goes round it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` and what the layer adds to it."""
        return x + F.relu(self.norm(self.conv(x)))


def pruned(model: nn.Module, x: Any, library: str, **how: Any) -> Prepared:
    """Return a pruning of half of the channels as users of a library call it."""

    def ours() -> object:
        return prune_filters(model, x, 0.5, progress=False, **how)

    def theirs() -> None:
        pruning = importlib.import_module("torch_pruning")
        ends = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
        importance = pruning.importance.GroupMagnitudeImportance(p=1)
        pruning.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=ends).step()

    return (ours if library == OURS else theirs), nbytes(model)


def nbytes(model: nn.Module) -> int:
    """Return what a model's parameters take up."""
    return sum(parameter.nbytes for parameter in model.parameters())


def linear_chain(depth: int, library: str) -> Prepared:
    """Prune so many linear layers of 64 units."""
    return pruned(chain("mlp", depth).eval(), torch.randn(1, 64), library)


def conv_chain(depth: int, library: str) -> Prepared:
    """Prune so many convolutions with BatchNorm, of 16 channels."""
    return pruned(chain("conv", depth).eval(), torch.randn(1, 3, 16, 16), library)


def residual_chain(depth: int, library: str) -> Prepared:
    """Prune so many residual convolutions, of 16 channels."""
    blocks = [Residual(16) for _ in range(depth)]
    ends = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000))
    return pruned(nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, ends).eval(), torch.randn(1, 3, 16, 16), library)


def wide_layers(width: int, library: str) -> Prepared:
    """Prune four linear layers of a width."""
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
    return pruned(nn.Sequential(*layers, nn.Linear(width, 1000)).eval(), torch.randn(1, width), library)


def llama(millions: int) -> nn.Module:
    """Build a Llama of about so many million parameters, in bfloat16 above 200."""
    library = importlib.import_module("transformers")
    widths = {
        9: (256, 8, 4096),
        25: (448, 8, 8000),
        95: (768, 10, 16000),
        400: (1280, 16, 32000),
        1000: (2048, 16, 32000),
    }
    width, depth, words = widths[millions]
    config = library.LlamaConfig(
        hidden_size=width, intermediate_size=8 * width // 3 // 16 * 16, num_hidden_layers=depth, vocab_size=words,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=256,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if millions > 200 else torch.float32)
    try:
        return library.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Draw one sequence of tokens."""
    return {"input_ids": torch.randint(model.config.vocab_size, (1, length))}


def llama_filters(millions: int, library: str) -> Prepared:
    """Prune the units of a Llama."""
    model = llama(millions)
    return pruned(model, tokens(model, 16), library)


def vit(blocks: int, library: str) -> Prepared:
    """Prune a ViT of so many blocks, as wide as ViT-L."""
    kind = importlib.import_module("torchvision.models").VisionTransformer
    model = kind(224, 16, blocks, 16, 1024, 4096).eval()
    return pruned(model, torch.randn(1, 3, 224, 224), library)


def weights(scope: str) -> Callable[[int, str], Prepared]:
    """Mask half of so many million weights, in four layers."""

    def prepare(millions: int, library: str) -> Prepared:
        width = round((millions * 1e6 / 4) ** 0.5)
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(4)])
        return (lambda: prune_weights(model, 0.5, scope=scope)), nbytes(model)

    return prepare


def state_dict(millions: int, library: str) -> Prepared:
    """Write the state dict of so many million masked weights, and its masks."""
    width = round((millions * 1e6 / 4) ** 0.5)
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(4)])
    prune_weights(model, 0.5)
    return (lambda: torch.save(model.state_dict(), io.BytesIO())), nbytes(model)


def surgery_by_width(width: int, library: str) -> Prepared:
    """Prune one linear layer by second-order surgery."""
    model, batch = nn.Linear(width, width), torch.randn(2 * width, width)
    return (lambda: prune_obs(model, 0.5, batches=[batch], progress=False)), nbytes(model)


def surgery_by_depth(sequential: bool) -> Callable[[int, str], Prepared]:
    """Prune a decoder of so many blocks by second-order surgery, on two sequences of 128 tokens."""

    def prepare(depth: int, library: str) -> Prepared:
        block = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, norm_first=True)
        model = nn.Sequential(*[copy.deepcopy(block) for _ in range(depth)]).eval()
        batches = [torch.randn(1, 128, 128) for _ in range(2)]
        return (lambda: prune_obs(model, 0.5, batches=batches, sequential=sequential, progress=False)), nbytes(model)

    return prepare


def surgery_of_llamas(millions: int, library: str) -> Prepared:
    """Prune a Llama in sequence by second-order surgery, all but its head, on two sequences of 128 tokens."""
    model = llama(millions)
    batches = [tokens(model, 128) for _ in range(2)]

    def run() -> object:
        return prune_obs(model, 0.5, batches=batches, sequential=True, ignore=["lm_head"], progress=False)

    return run, nbytes(model)


def scores(criterion: str) -> Callable[[int, str], Prepared]:
    """Score the units of four linear layers of a width, on two batches."""

    def prepare(width: int, library: str) -> Prepared:
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
        model = nn.Sequential(*layers, nn.Linear(width, 10)).eval()
        batches = [(torch.randn(32, width), torch.randint(10, (32,))) for _ in range(2)]
        structure = find_groups(model, batches[0][0][:1])
        return (lambda: score_units(model, structure, criterion, batches, loss)), nbytes(model)

    return prepare


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def oracle(width: int, library: str) -> Prepared:
    """Compare one criterion with what the removal of each unit does, in two layers of a width."""
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    batch = torch.randn(32, 64), torch.randint(10, (32,))

    def run() -> object:
        return compare_criteria(model, batch[0][:1], criteria=["l1"], batches=[batch], loss=loss, progress=False)

    return run, nbytes(model)


BOTH = (OURS, THEIRS)
ROWS = {
    "linear chain": Row("chains", "layers", (100, 200, 400, 800), linear_chain, BOTH, 1.1),
    "conv + BN chain": Row("chains", "layers", (100, 200, 400, 800), conv_chain, BOTH, 1.1),
    "residual chain": Row("chains", "layers", (100, 200, 400, 800), residual_chain, BOTH, 1.1),
    "four wide layers": Row("models", "units each", (512, 1024, 2048, 4096), wide_layers, BOTH, 2.1),
    "Llama": Row("models", "million parameters", (95, 400, 1000), llama_filters, BOTH, 1.1),
    "ViT, as wide as ViT-L": Row("models", "blocks", (6, 12, 24), vit, BOTH, 1.1),
    "weights, global": Row("weights", "million weights", (34, 68, 136, 272, 500), weights("global"), goal=1.05),
    "weights, by layer": Row("weights", "million weights", (34, 68, 136, 272, 500), weights("layer"), goal=1.05),
    "state dict with masks": Row("weights", "million weights", (34, 68, 136, 272, 500), state_dict, goal=1.05),
    "surgery by width": Row("surgery", "columns and rows", (64, 128, 256, 512, 1024, 2048), surgery_by_width, goal=3.1),
    "surgery by depth": Row("surgery", "blocks", (2, 4, 8, 16), surgery_by_depth(False), goal=1.1),
    "surgery by depth, in sequence": Row("surgery", "blocks", (2, 4, 8, 16), surgery_by_depth(True), goal=1.1),
    "surgery of Llamas": Row("llamas", "million parameters", (9, 25, 95), surgery_of_llamas),
    "Taylor's scores": Row("scores", "units each", (512, 1024, 2048, 4096), scores("taylor"), goal=2.1),
    "output_change": Row("scores", "units each", (128, 256, 512, 1024), scores("output_change"), goal=2.1),
    "oracle": Row("scores", "units each", (64, 128, 256, 512), oracle),
}  # fmt: skip


def resident(which: str) -> int:
    """Return this process's resident memory in bytes, ``VmRSS`` now or ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def measure(name: str, size: int, library: str) -> dict[str, float]:
    """Measure one call in this process: seconds, and memory in shares of the model."""
    torch.manual_seed(0)
    row = ROWS[name]
    call, _ = row.prepare(row.sizes[0], library)
    call()
    del call
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    call, held = row.prepare(size, library)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    call()
    seconds = time.process_time() - start
    return {"seconds": seconds, "memory": (resident("VmHWM") - before) / held, "bytes": held}


def in_a_process_of_its_own(name: str, size: int, library: str) -> dict[str, Any]:
    """Measure where nothing else has been held before; what fails is noted with its last line."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", name, str(size), library]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIVEN_UP)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {GIVEN_UP} seconds"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def exponent(found: dict[str, dict[str, Any]]) -> float | None:
    """Return the slope of a line through the logarithms of sizes and seconds; of one size there is none."""
    points = [(math.log(int(size)), math.log(of["seconds"])) for size, of in found.items() if "seconds" in of]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return slope / sum((x - mean_x) ** 2 for x, _ in points)


def table_of(title: str, results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> Table:
    """Lay out the rows of one table: seconds and memory at each size, and the exponent."""
    table = Table(title=f"{title}: CPU seconds (memory beyond the model, in models)")
    for column in ("row", "library", "sizes", "seconds (memory)", "exponent", "goal"):
        table.add_column(column)
    for name, row in ROWS.items():
        if row.table != title or name not in results:
            continue
        for library, found in results[name].items():
            told = []
            for of in found.values():
                told.append(of.get("failed") or f"{of['seconds']:.2f} ({of['memory']:.2f})")
            slope = exponent(found)
            shown = "" if slope is None else f"{slope:.2f}"
            goal = f"{row.goal}" if row.goal and library == OURS else ""
            table.add_row(name, library, f"{', '.join(found)} {row.size}", ", ".join(told), shown, goal)
    return table


def draw(results: dict[str, dict[str, dict[str, dict[str, Any]]]], target: Path) -> None:
    """Draw seconds against sizes, both axes logarithmic, one panel for each table."""
    plt = importlib.import_module("matplotlib.pyplot")
    titles = list(dict.fromkeys(row.table for name, row in ROWS.items() if name in results))
    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.2 * lines), squeeze=False)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis, title in zip(axes.flat, titles, strict=False):
        names = [name for name, row in ROWS.items() if row.table == title and name in results]
        for number, name in enumerate(names):
            for library, found in results[name].items():
                points = [(int(size), of["seconds"]) for size, of in found.items() if "seconds" in of]
                if points:
                    style = "o-" if library == OURS else "x--"
                    slope = exponent(found)
                    told = "" if slope is None else f" (exponent {slope:.2f})"
                    axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{name}, {library}{told}")
        axis.set(
            xscale="log",
            yscale="log",
            title=title,
            ylabel="CPU seconds",
            xlabel=" / ".join({ROWS[n].size for n in names}),
        )
        axis.grid(visible=True, which="both", alpha=0.2)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    """Read the command line, measure, print the tables, write the JSON and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = list(dict.fromkeys(row.table for row in ROWS.values()))
    parser.add_argument("--only", nargs="+", default=tables, choices=[*tables, *ROWS], help="tables, or rows of them")
    parser.add_argument("--largest", type=int, default=500, help="million weights that thresholds go up to")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("ROW", "SIZE", "LIBRARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments.one:
        name, size, library = arguments.one
        print(json.dumps(measure(name, int(size), library)))
        return
    kept = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else {}
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = dict(kept)
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    for name, row in ROWS.items():
        if row.table not in arguments.only and name not in arguments.only:
            continue
        sizes = [size for size in row.sizes if row.table != "weights" or size <= arguments.largest]
        results[name] = {library: {} for library in row.libraries}
        for size in sizes:
            for library in row.libraries:  # in turns, so that both see the same machine
                results[name][library][str(size)] = in_a_process_of_its_own(name, size, library)
        slopes = {library: exponent(found) for library, found in results[name].items()}
        Console().print(name, slopes)
        ordered = {name: results[name] for name in ROWS if name in results}
        arguments.out.write_text(json.dumps(about | {"results": ordered}, indent=1) + "\n")
    console = Console(width=160)
    for title in tables:
        if any(ROWS[name].table == title for name in results):
            console.print(table_of(title, results))
    draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
