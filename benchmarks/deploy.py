"""Takes a dense, a pruned and a masked network to several runtimes, in 32 and in 8 bits: bytes, latency, accuracy.

    python -m benchmarks.deploy            # trains on scikit-learn's digits; writes deploy.json and prints its table
    python -m benchmarks.deploy --widths   # instead: latency of convolutions against their width
    python -m benchmarks.deploy --show     # prints the tables of deploy.json

Runtimes that are not installed are left out. One thread each. All forms of a network take turns while they are timed:
other programs disturb all of them alike. The figure is the lower quartile, since these only add time.
"""

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import resnet_cifar
from lightning_prune import Cubic, FilterL1Pruning, IterativeMagnitudePruning

RESULTS = Path(__file__).with_suffix(".json")
PATCHES, PIXELS = 16, 4  # of 8x8 pixels
ROUNDS = 60
WIDTHS = (64, 61, 48, 45, 40, 37, 32, 29)
COMPILED = ("ONNX Runtime", "int8: ONNX Runtime, calibrated", "OpenVINO", "int8: the same file in OpenVINO")
Predict = Callable[[Tensor], Tensor]
Datasets = tuple[TensorDataset, TensorDataset]


class Form(NamedTuple):
    """A network in a runtime: bytes on disk, and what computes its outputs."""

    size: int
    predict: Predict


# Networks


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = [
            part(y).unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        ]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.hidden(self.norm2(x))


class Transformer(nn.Module):
    """Reads an image of 8x8 pixels as 16 patches."""

    def __init__(self, width: int = 192, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.place = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        self.blocks = nn.Sequential(*(Block(width, 6) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)
        return self.head(self.blocks(self.embed(patches) + self.place).mean(1))


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, one: Tensor) -> None:
        super().__init__()
        self.net, self.example_input_array = net, one

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "ResNet-20, 32x32": (
        lambda: resnet_cifar(20),
        lambda x: F.interpolate(x, 32, mode="bilinear").expand(-1, 3, -1, -1),
    ),
    "transformer, 16 patches": (Transformer, lambda x: x),
}
STATES: dict[str, Callable[[], list[Any]]] = {
    "dense": lambda: [],
    "half the FLOPs": lambda: [FilterL1Pruning(0.5, target="flops", schedule=Cubic(2, 5), round_to=8, report=False)],
    "70 % zeros": lambda: [IterativeMagnitudePruning(0.7, scope="global", schedule=Cubic(2, 5), report=False)],
}


def digits(shown: Callable[[Tensor], Tensor]) -> Datasets:
    """Return training and test images; every fifth is for testing."""
    images, labels = load_digits(return_X_y=True)
    found = shown(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16).contiguous()
    held_out = torch.arange(len(labels)) % 5 == 0
    labels = torch.tensor(labels)
    return TensorDataset(found[~held_out], labels[~held_out]), TensorDataset(found[held_out], labels[held_out])


def trained(make: Callable[[], nn.Module], callbacks: list[Any], data: Datasets, epochs: int) -> nn.Module:
    pl.seed_everything(0, verbose=False)
    module = Classifier(make(), data[0][:1][0])
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data[0], 64, shuffle=True))
    return module.net.eval()


# Runtimes


def forms(net: nn.Module, calibration: Tensor, folder: Path) -> Iterator[tuple[str, Form]]:
    """Yield the network in every runtime that is installed, by name."""
    yield "PyTorch", Form(_saved(net.state_dict(), folder / "net.pt"), net)
    batch = {"images": {0: torch.export.Dim.DYNAMIC}}
    names = net.forward.__code__.co_varnames[1:2]
    # A copy of the inputs: the file holds them, and of a slice the whole tensor that it was cut from.
    exported = torch.export.export(net, (calibration[:2].clone(),), dynamic_shapes={names[0]: batch["images"]})
    torch.export.save(exported, folder / "net.pt2")
    yield "torch.export", Form(_size(folder / "net.pt2"), exported.module())
    if _installed("executorch"):
        yield "ExecuTorch", _executorch(net, names[0], calibration, folder / "net.pte")
    traced = torch.jit.freeze(torch.jit.trace(net, calibration[:2]))
    traced.save(folder / "net.ts")
    yield "TorchScript", Form(_size(folder / "net.ts"), traced)
    if _installed("onnx", "onnxscript", "onnxruntime"):
        yield from _onnx_forms(net, calibration, folder)
    if _installed("openvino"):
        yield "OpenVINO", _openvino(net, folder / "net.xml", example_input=calibration[:2])
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    yield "int8: quantize_dynamic", Form(_saved(quantized.state_dict(), folder / "dynamic.pt"), quantized)
    if _installed("torchao"):
        yield "int8: torchao", _torchao(net, folder / "torchao.pt")


def _onnx_forms(net: nn.Module, calibration: Tensor, folder: Path) -> Iterator[tuple[str, Form]]:
    path = folder / "net.onnx"
    torch.onnx.export(
        net, (calibration[:2],), path, dynamo=True, external_data=False, verbose=False, input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    yield "ONNX Runtime", Form(_size(path), _session(path))
    quantization = importlib.import_module("onnxruntime.quantization")

    class Batches(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left = [{"images": part.numpy()} for part in calibration.split(32)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    prepared, int8 = folder / "prepared.onnx", folder / "int8.onnx"
    quantization.shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(prepared, int8, Batches(), per_channel=True)
    yield "int8: ONNX Runtime, calibrated", Form(_size(int8), _session(int8))
    if _installed("openvino"):
        yield "int8: the same file in OpenVINO", _openvino(int8, folder / "int8.xml")


def _session(path: Path) -> Predict:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _openvino(net: Any, path: Path, **more: Any) -> Form:
    openvino = importlib.import_module("openvino")
    made = openvino.convert_model(net, **more)
    openvino.save_model(made, path, compress_to_fp16=False)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    size = _size(path) + _size(path.with_suffix(".bin"))
    return Form(size, lambda images: torch.from_numpy(compiled(images.numpy())[0]))


def _executorch(net: nn.Module, name: str, largest: Tensor, path: Path) -> Form:
    exir, runtime = importlib.import_module("executorch.exir"), importlib.import_module("executorch.runtime")
    partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    # Memory is planned ahead: the example is the largest batch that the file shall take.
    batch = torch.export.Dim("batch", max=len(largest))
    exported = torch.export.export(net, (largest,), dynamic_shapes={name: {0: batch}})
    lowered = exir.to_edge_transform_and_lower(exported, partitioner=[partitioner.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    importlib.import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(1)
    method = runtime.Runtime.get().load_program(path).load_method("forward")

    def predict(images: Tensor) -> Tensor:
        return torch.cat([method.execute([part])[0] for part in images.split(len(largest))])

    return Form(_size(path), predict)


def _torchao(net: nn.Module, path: Path) -> Form:
    quantization = importlib.import_module("torchao.quantization")

    quantized = copy.deepcopy(net)
    quantization.quantize_(quantized, quantization.Int8DynamicActivationInt8WeightConfig())
    return Form(_saved(quantized.state_dict(), path), quantized)


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _saved(state: Any, path: Path) -> int:
    torch.save(state, path)
    return _size(path)


def _size(path: Path) -> int:
    return path.stat().st_size


# Figures


def latencies(runners: dict[str, Predict], images: Tensor) -> dict[str, float]:
    """Return the milliseconds of a call of each, the lower quartile; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(ROUNDS + 5):
        for name, predict in runners.items():
            start = perf_counter()
            predict(images)
            if turn >= 5:  # before that, caches and code are made
                times[name].append(1000 * (perf_counter() - start))
    return {name: statistics.quantiles(found, n=4)[0] for name, found in times.items()}


def accuracy(predict: Predict, data: TensorDataset) -> float:
    images, labels = data[:]
    return float((predict(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def compared(name: str, epochs: int) -> list[dict[str, Any]]:
    """Train, prune and convert one network; return a row for each of its forms."""
    make, shown = NETWORKS[name]
    data = digits(shown)
    found: dict[tuple[str, str], Form] = {}
    with TemporaryDirectory() as scratch:
        for number, (state, callbacks) in enumerate(STATES.items()):
            with torch.enable_grad():
                net = trained(make, callbacks(), data, epochs)
            folder = Path(scratch) / str(number)
            folder.mkdir()
            for form, made in forms(net, data[0][:256][0], folder):
                found[state, form] = made
            print(f"{name}, {state}: {accuracy(net, data[1]):.1%}", flush=True)
        runners = {f"{state}|{form}": made.predict for (state, form), made in found.items()}
        one, many = (latencies(runners, data[1][:size][0]) for size in (1, 32))
        rows = []
        for (state, form), made in found.items():
            key = f"{state}|{form}"
            row = {"network": name, "state": state, "form": form, "bytes": made.size, "ms_1": one[key]}
            rows.append({**row, "ms_32": many[key], "accuracy": accuracy(made.predict, data[1])})
    return rows


def tower(width: int) -> nn.Module:
    """Return four convolutions with as many channels each, and a classifier."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@torch.no_grad()
def of_widths() -> list[dict[str, Any]]:
    """Return the latency of 32 images of 14x14 pixels in the runtimes that compile, for every width."""
    images = torch.randn(64, 3, 14, 14)
    found: dict[tuple[int, str], Form] = {}
    with TemporaryDirectory() as scratch:
        for width in WIDTHS:
            folder = Path(scratch) / str(width)
            folder.mkdir()
            for form, made in forms(tower(width).eval(), images, folder):
                if form in COMPILED:
                    found[width, form] = made
        times = latencies({f"{width}|{form}": made.predict for (width, form), made in found.items()}, images[:32])
    return [
        {"width": width, "form": form, "bytes": made.size, "ms_32": times[f"{width}|{form}"]}
        for (width, form), made in found.items()
    ]


def table_of_widths(rows: list[dict[str, Any]]) -> str:
    """Return milliseconds for 32 images as a table of Markdown, a line for each runtime."""
    lines = ["| channels of each layer | " + " | ".join(str(width) for width in WIDTHS) + " |"]
    lines.append("| --- |" + " --- |" * len(WIDTHS))
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = [f"{row['ms_32']:.1f}" for row in rows if row["form"] == form]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as tables of Markdown: kilobytes, milliseconds for one and for 32 images, accuracy."""
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        states = list(dict.fromkeys(row["state"] for row in own))
        lines += [f"| {network} | " + " | ".join(states) + " |", "| --- |" + " --- |" * len(states)]
        for form in dict.fromkeys(row["form"] for row in own):
            cells = [_cell(row) for row in own if row["form"] == form]
            lines.append(f"| {form} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    size = "–" if row["bytes"] is None else f"{row['bytes'] / 1000:,.0f} kB"
    return f"{size}, {row['ms_1']:.2f} ms, {row['ms_32']:.1f} ms, {100 * row['accuracy']:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--widths", action="store_true", help="measure widths of convolutions, and nothing else")
    parser.add_argument("--show", action="store_true", help="print the tables of what was measured before")
    options = parser.parse_args()
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.show:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        stored |= _measured_widths() if options.widths else _measured(options.networks, options.epochs)
        options.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored.get("rows", [])))
    print(table_of_widths(stored.get("widths", [])))


def _measured(networks: list[str], epochs: int) -> dict[str, Any]:
    rows, load = [], [os.getloadavg()[0]]
    for name in networks:
        rows += compared(name, epochs)
        load.append(os.getloadavg()[0])
    return {"machine": {**_machine(), "load": load}, "rows": rows}


def _measured_widths() -> dict[str, Any]:
    load = [os.getloadavg()[0]]
    rows = of_widths()
    return {"machine_of_widths": {**_machine(), "load": [*load, os.getloadavg()[0]]}, "widths": rows}


def _machine() -> dict[str, Any]:
    """Return the processor, the cores and the versions; the load is how many programs want a core."""
    packages = ("torch", "executorch", "onnxruntime", "openvino", "torchao")
    versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": 1, "python": platform.python_version(), **versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return found[0].partition(":")[2].strip() if found else platform.processor()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
