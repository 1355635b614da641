"""Measures the bytes of LeNet-300-100 and LeNet-5 on MNIST at the dense network's error, as Deep Compression does.

    python -m benchmarks.bytes --data DIR

Each network is trained densely, pruned by ``IterativeMagnitudePruning`` while it trains on, and then trained on with
``WeightSharing``. The file of ``save_sparse`` is measured whole, with its header, loaded into a new network, and that
network is tested. Beside it the dense network is trained on for as long in all, and weights share values by a hash
(Chen et al. 2015) instead of a codebook, at no fewer bytes: all weights from the start, or those that survive pruning.
A hash needs no codes; the bytes of such a file are counted, since nothing writes it. Errors are those after the last
pass. Results go into ``bytes.json`` beside this file as they come, and what is there is not trained again.
"""

import copy
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches
from benchmarks.han2015 import NETWORKS, begin, command_line, left, pruning, train
from benchmarks.training import Classifier, accuracy
from lightning_prune import load_sparse_, save_sparse
from lightning_prune.callbacks import WeightSharing
from lightning_prune.reports import stored_table
from lightning_prune.surgery.masks import masks_on
from lightning_prune.surgery.shared_values import hold_shared

RESULTS = Path(__file__).with_suffix(".json")
PAPER = {  # Han et al. 2016, Table 1: error in % of the dense and the compressed network, times smaller
    "LeNet-300-100": (1.64, 1.58, 40),
    "LeNet-5": (0.80, 0.74, 39),
}
PASSES = {"LeNet-300-100": (4, 8, 4), "LeNet-5": (2, 4, 2)}  # dense, pruned, with shared values
ARMS = ("dense", "dense, on", "pruned", "codebook", "hash of what survives", "hash of all")
SHARED_LR, HASHED_LR = 3e-4, 1e-3  # of Adam: it does not mind that gradients are summed; a hash has more to mend


class Adam(Classifier):
    """A network whose shared values are trained by Adam; the learning rate falls to zero."""

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Hashed(pl.Callback):
    """Holds weights at values that they share by given codes, while a Trainer trains."""

    def __init__(self, codes: Mapping[str, Tensor]):
        self.codes = {f"net.{name}": own for name, own in codes.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held = hold_shared(pl_module, trainer.optimizers, self.codes)
        self.held.__enter__()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held.__exit__(None, None, None)


class Run:
    """One network with one seed, trained in every arm.

    Args:
        name: The network.
        seed: What its weights and the order of the images start from.
        data: Images and digits to train on, and to test on.
        kept: Share of the weights that survives pruning.
        bits: Bits of a code.
    """

    def __init__(self, name: str, seed: int, data: tuple[Tensor, ...], kept: float, bits: int):
        self.name, self.seed, self.kept, self.bits = name, seed, kept, bits
        self.images, self.labels, *tests = data
        self.tests = Batches(*tests, 1000)
        self.passes = PASSES[name]
        self.results: dict[str, dict[str, float]] = {}

    def all(self) -> dict[str, dict[str, float]]:
        """Train in every arm, and return what each came to."""
        torch.manual_seed(self.seed)
        dense = NETWORKS[self.name]().to(memory_format=torch.channels_last)  # twice as fast on a CPU
        initial = copy.deepcopy(dense)
        first, second, third = self.passes
        train(dense, self._batches(0), first, 0.1)
        self._note("dense", dense, None)

        further = copy.deepcopy(dense)
        train(further, self._batches(1), second + third, 0.1)
        self._note("dense, on", further, None)

        pruned = copy.deepcopy(dense)
        batches = self._batches(1)
        train(pruned, batches, second, 0.1, [pruning(1 - self.kept, second * len(batches))])
        self._note("pruned", pruned, None)

        shared = copy.deepcopy(pruned)
        self._train_shared(shared, [WeightSharing(self.bits)], third)
        stored = self._note("codebook", shared, None)

        # A hash may use all bytes that codes and codebooks take; places of what survives are stored either way.
        parts = {tensor.name: tensor.bytes_after for tensor in stored.tensors if tensor.form == "shared"}
        places = {name: _bytes_of_places(mask) for name, mask in masks_on(shared).items()}
        counts = {name: max(1, (parts[name] - places[name]) // 4) for name in parts}
        codes = {name: _hashed(mask, counts[name], self.seed) for name, mask in masks_on(shared).items()}
        survivors = copy.deepcopy(pruned)
        _set_means(survivors, codes)
        self._train_shared(survivors, [Hashed(codes)], third, HASHED_LR)
        self._note("hash of what survives", survivors, self.results["codebook"]["bytes"])

        whole = {name: torch.ones_like(mask) for name, mask in masks_on(shared).items()}
        codes = {name: _hashed(mask, parts[name] // 4, self.seed) for name, mask in whole.items()}
        _set_firsts(initial, codes)
        self._train_shared(initial, [Hashed(codes)], first + second + third, HASHED_LR)
        self._note("hash of all", initial, self.results["codebook"]["bytes"])
        return self.results

    def _train_shared(self, net: nn.Module, callbacks: Iterable[pl.Callback], epochs: int, lr: float = SHARED_LR):
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(Adam(net.train(), lr=lr), self._batches(2))

    def _note(self, arm: str, net: nn.Module, counted: float | None):
        """Write the file of a network, load it into a new one, test that, and note error and bytes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "it.safetensors"
            start = time.perf_counter()
            report = save_sparse(net, path)
            saving = time.perf_counter() - start
            loaded = NETWORKS[self.name]()
            load_sparse_(loaded, path)
            size = path.stat().st_size if counted is None else counted
        self.results[arm] = {
            "error": round(100 * (1 - accuracy(loaded, self.tests)), 2),
            "left": round(left(loaded), 5),
            "bytes": size,
            "times smaller": round(report.bytes_before / size, 2),
            "seconds to save": round(saving, 2),
        }
        if arm == "codebook":
            Console().print(stored_table(report))
        return report

    def _batches(self, which: int) -> Batches:
        return Batches(self.images, self.labels, 128, train=True, seed=self.seed + 1000 * which, crop=False)


def _bytes_of_places(mask: Tensor) -> int:
    """Return the fewest bytes that the places of independent zeros take: their entropy."""
    p = float(mask.float().mean())
    if p in (0.0, 1.0):
        return 0
    return int(mask.numel() * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8)


def _hashed(mask: Tensor, count: int, seed: int) -> Tensor:
    """Return a random code of ``count`` for each entry that is kept, and 0 for the others."""
    codes = torch.randint(1, count + 1, mask.shape, generator=torch.Generator().manual_seed(seed))
    return codes * mask


def _set_means(net: nn.Module, codes: Mapping[str, Tensor]) -> None:
    """Set the weights of each code to their mean."""
    for name, own in codes.items():
        weight, flat = net.get_parameter(name).data, own.reshape(-1)
        sums = torch.zeros(int(flat.max()) + 1).index_add_(0, flat, weight.reshape(-1))
        sizes = flat.bincount(minlength=len(sums)).clamp(min=1)
        weight.copy_((sums / sizes)[flat].view(weight.shape))


def _set_firsts(net: nn.Module, codes: Mapping[str, Tensor]) -> None:
    """Set the weights of each code to one of them, so that they vary as much as before."""
    for name, own in codes.items():
        weight, flat = net.get_parameter(name).data, own.reshape(-1)
        values = torch.zeros(int(flat.max()) + 1)
        values[flat.flip(0)] = weight.reshape(-1).flip(0)
        weight.copy_(values[flat].view(weight.shape))


def table(name: str, found: dict) -> Table:
    """Mean and spread over the seeds, beside what the paper reports."""
    dense, compressed, times = PAPER[name]
    rows = Table("", "weights left", "error %", "spread", "bytes", "times smaller", "seeds", title=f"{name} on MNIST")
    for arm in ARMS:
        own = [seed[arm] for seed in found.values() if arm in seed]
        if not own:
            continue
        errors = [each["error"] for each in own]
        spread = f"{stdev(errors):.2f}" if len(errors) > 1 else ""
        share, size = mean(each["left"] for each in own), mean(each["bytes"] for each in own)
        smaller = min(each["times smaller"] for each in own)
        cells = f"{share:.2%}", f"{mean(errors):.2f}", spread, f"{size:,.0f}", f"{smaller:.1f}", str(len(own))
        rows.add_row(arm, *cells)
    rows.add_section()
    rows.add_row("Deep Compression, dense", "100%", f"{dense:.2f}", "", "", "1.0")
    rows.add_row("Deep Compression", "8%", f"{compressed:.2f}", "", "", f"{times:.1f}")
    return rows


def main() -> None:
    """Read the command line, train, print the tables, write the JSON."""
    parser = command_line(__doc__, 2, RESULTS, torch.get_num_threads())
    parser.add_argument("--kept", type=float, default=0.08, help="share of the weights that survives pruning")
    parser.add_argument("--bits", type=int, default=5)
    options, data, results = begin(parser)
    for name in options.networks:
        for seed in range(options.seeds):
            found = results.setdefault(name, {})
            if str(seed) not in found:
                found[str(seed)] = Run(name, seed, data, options.kept, options.bits).all()
                options.json.write_text(json.dumps(results, indent=1) + "\n")
        Console().print(table(name, results[name]))


if __name__ == "__main__":
    main()
