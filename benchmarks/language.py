"""Prunes a small character Llama as language models are pruned, beside the published ways.

    python -m benchmarks.language --data ../data                  # all tables
    python -m benchmarks.language --data ../data --only weights   # some of them

``weights``: half and more of the weights set to zero at once, beside magnitude, Wanda and SparseGPT of llm-compressor,
on the same text. ``widths``: heads and their keys, feed-forward units, and a quarter or a half of all FLOPs, beside
torch-pruning's way for language models at the same FLOPs; nothing is trained afterwards. ``saving``: what
``from_pretrained`` builds of a pruned model. ``sizes``: seconds and memory of larger models, with random weights, each
in a process of its own. Seconds are of the CPU, by one thread. The model is trained first, in some ten minutes, and
kept in a file. Results are written to ``language.json`` beside this file, row by row; a table made anew replaces what
was there.
"""

import argparse
import copy
import gc
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.language_model import CONTEXT, Text, llama, loss, perplexity, read, trained
from benchmarks.scale import resident
from lightning_prune import count_flops, prune_filters, prune_obs, prune_weights

RESULTS = Path(__file__).with_suffix(".json")
HEAD = "lm_head"  # stays dense, as in the papers
Row = dict[str, Any]
Prune = Callable[[nn.Module], object]


# --- single weights


def weights(model: nn.Module, text: Text) -> Iterator[Row]:
    """Zero weights by every way and share, and yield what is left of the perplexity."""
    yield {"way": "dense", "share": "", "perplexity": perplexity(model, text.held)}
    batches = list(text.calibration[:, :-1].split(16))
    for share, (amount, pattern) in {
        "50 %": (0.5, None),
        "60 %": (0.6, None),
        "70 %": (0.7, None),
        "2:4": (0.5, "2:4"),
    }.items():
        for way, prune in ways_for_weights(batches, amount, pattern).items():
            pruned = copy.deepcopy(model)
            seconds = timed(prune, pruned)
            yield {
                "way": way,
                "share": share,
                "perplexity": perplexity(pruned, text.held),
                "zeros": zeros(pruned),
                "seconds": seconds,
            }


def ways_for_weights(batches: list[Tensor], amount: float, pattern: str | None) -> dict[str, Prune]:
    """Return every way to zero weights of a model, ours behind the others."""
    share = None if pattern else amount
    ours = partial(
        prune_obs, amount=share, pattern=pattern, batches=batches, forward=run, sequential=True, ignore=[HEAD],
        progress=False,
    )  # fmt: skip
    ways: dict[str, Prune] = {"magnitude": lambda m: prune_weights(m, share, pattern=pattern, ignore=[HEAD])}
    if importlib.util.find_spec("llmcompressor"):
        for name, modifier in {"Wanda": "WandaPruningModifier", "SparseGPT": "SparseGPTModifier"}.items():
            ways[f"{name}, llm-compressor"] = partial(
                by_llm_compressor, batches=batches, modifier=modifier, amount=amount, pattern=pattern
            )
    ways["ours, blocked, not in sequence"] = partial(ours, solver="blocked", sequential=False)
    ways["ours, blocked"] = partial(ours, solver="blocked")
    ways["ours, admm"] = partial(ours, solver="admm")
    if not pattern:  # which is the same share everywhere
        ways["ours, blocked, split over layers"] = partial(ours, solver="blocked", scope="global")
        ways["ours, admm, split over layers"] = partial(ours, solver="admm", scope="global")
    return ways


def by_llm_compressor(model: Any, batches: list[Tensor], modifier: str, amount: float, pattern: str | None) -> None:
    """Prune by llm-compressor, block after block, as it is called for any decoder."""
    modifiers = importlib.import_module("llmcompressor.modifiers.pruning")
    recipe = getattr(modifiers, modifier)(
        sparsity=amount, mask_structure=pattern or "0:0", targets=["Linear"], ignore=[f"re:.*{HEAD}"]
    )
    data = DataLoader([{"input_ids": batch} for batch in batches], batch_size=None)
    words = importlib.import_module("tokenizers").Tokenizer(importlib.import_module("tokenizers").models.WordLevel({}))
    tokenizer = importlib.import_module("transformers").PreTrainedTokenizerFast(tokenizer_object=words)  # not read
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # whose name it looks up
        model.config.name_or_path = folder
        importlib.import_module("llmcompressor").oneshot(
            model=model, processor=tokenizer, dataset=data, recipe=recipe, pipeline="sequential",
            num_calibration_samples=len(batches),
        )  # fmt: skip


def zeros(model: nn.Module) -> float:
    """Return the share of zeros in the weights of linear layers but for the head."""
    own = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != HEAD]
    return sum(int((weight == 0).sum()) for weight in own) / sum(weight.numel() for weight in own)


# --- widths


PRODUCERS = {"half of the heads": "*.q_proj", "half of the feed-forward units": "*.gate_proj"}
RATIOS = {
    "half of the heads": {"heads": 0.5, "hidden": 0.0, "units": 0.0},
    "half of the feed-forward units": {"heads": 0.0, "hidden": 0.0, "units": 0.5},
}


def widths(model: nn.Module, text: Text) -> Iterator[Row]:
    """Remove heads, feed-forward units, or a share of all FLOPs, and yield what is left.

    torch-pruning comes to no end where heads share keys, so keys and values are written out for every head first: the
    same function, from which both prune. Below stands what is made of the model as it was trained.
    """
    x = example(text.characters)
    forms = {"a key for every head": written_out(model), "shared keys": model}
    shares = {"25 % of the FLOPs": 0.25, "50 % of the FLOPs": 0.5}
    for form, dense in forms.items():
        for part in ("half of the heads", "half of the feed-forward units", *shares):
            if form != "shared keys" and importlib.util.find_spec("torch_pruning"):
                ratios = RATIOS.get(part) or ratios_for(dense, x, shares[part])
                for importance in ("magnitude", "taylor"):
                    theirs = partial(by_torch_pruning, text=text, importance=importance, **ratios)
                    row = what_is_left(dense, text, theirs)
                    yield {"keys": form, "part": part, "way": f"torch-pruning, {importance}", **row}
                if part in shares:
                    shares[part] = 1 - row["flops"]  # what one ratio for all widths comes to
            how: Row = {"amount": {PRODUCERS[part]: 0.5}} if part in PRODUCERS else {"amount": shares[part]}
            if part in shares:
                how |= {"target": "flops", "scope": "global"}
            for way, prune in ours_for_widths(text, how).items():
                yield {"keys": form, "part": part, "way": way, **what_is_left(dense, text, prune)}


def what_is_left(dense: nn.Module, text: Text, prune: Prune) -> Row:
    """Prune a copy, and return what is left of its FLOPs and of what it knows."""
    x, pruned = example(text.characters), copy.deepcopy(dense)
    try:
        seconds = timed(prune, pruned)
        flops = count_flops(pruned, x).total / count_flops(dense, x).total
        return {"flops": flops, "perplexity": perplexity(pruned, text.held), "seconds": seconds}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def written_out(model: Any) -> Any:
    """Return the same function by as many heads of keys and values as there are of queries."""
    config = copy.deepcopy(model.config)
    repeats = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    state = dict(model.state_dict())
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = state[name].unflatten(0, (-1, config.head_dim))
            state[name] = heads.repeat_interleave(repeats, 0).flatten(0, 1)
    whole = type(model)(config).eval()
    whole.load_state_dict(state)
    return whole


def ours_for_widths(text: Text, how: Row) -> dict[str, Prune]:
    """Return our ways to remove units."""
    batches = list(text.calibration.split(16))
    ours = partial(
        prune_filters, example_inputs=example(text.characters), batches=batches, loss=loss, progress=False, **how
    )
    ways: dict[str, Prune] = {"ours, taylor": partial(ours, criterion="taylor")}
    for criterion in ("taylor", "output_change", "obs"):
        ways[f"ours, {criterion}, repaired"] = partial(ours, criterion=criterion, repair=True)
    return ways


def ratios_for(dense: Any, x: Row, flops: float) -> dict[str, float]:
    """Return the ratios, one for all widths, by which torch-pruning comes nearest to removing so many FLOPs."""
    left = {}
    whole = count_flops(dense, x).total
    for hundredths in range(4, 60):
        ratios = dict.fromkeys(("heads", "hidden", "units"), hundredths / 100)
        tried = copy.deepcopy(dense)
        by_torch_pruning(tried, importance="magnitude", **ratios)
        left[hundredths] = abs(1 - flops - count_flops(tried, x).total / whole)
    return dict.fromkeys(ratios, min(left, key=left.__getitem__) / 100)


def by_torch_pruning(
    model: Any, importance: str, heads: float, hidden: float, units: float, text: Text | None = None
) -> None:
    """Prune as torch-pruning's example for language models does: whole heads, the width inside of them kept.

    Args:
        model: The model.
        importance: ``magnitude`` or ``taylor``.
        heads: Share of the heads that is pruned.
        hidden: Share of the width of what blocks add to.
        units: Share of the feed-forward units.
        text: Whose calibration pieces give Taylor's gradients.
    """
    library = importlib.import_module("torch_pruning")
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    counts, ratios = {}, {}
    for attention in attentions:
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            counts[layer], ratios[layer] = model.config.num_attention_heads, heads
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "up_proj")):
            ratios[module] = units
    if importance == "taylor" and text is not None:
        for batch in text.calibration.split(16):
            loss(model, batch).backward()
        kind = library.importance.GroupTaylorImportance
    else:
        kind = library.importance.GroupMagnitudeImportance
    model.config.use_cache = False  # with a cache it comes to no end either
    library.pruner.BasePruner(
        model, {"input_ids": example(model.config.vocab_size)["input_ids"]}, kind(group_reduction="mean"),
        pruning_ratio=hidden, pruning_ratio_dict=ratios, ignored_layers=[model.lm_head], num_heads=counts,
        prune_num_heads=heads > 0, prune_head_dims=False, head_pruning_ratio=heads,
        output_transform=lambda made: made.logits,
    ).step()  # fmt: skip
    model.zero_grad()


# --- saving


def saving(model: nn.Module, text: Text) -> Iterator[Row]:
    """Prune with one width for all blocks, save, build from the files, and compare."""
    x = example(text.characters)
    batches = list(text.calibration.split(16))
    for share in (0.25, 0.5):
        pruned: Any = copy.deepcopy(model)
        prune_filters(
            pruned, x, share, criterion="taylor", target="flops", scope="global", uniform=True, repair=True,
            batches=batches, loss=loss, progress=False,
        )  # fmt: skip
        prompt = text.held[:4, :16]
        with tempfile.TemporaryDirectory() as folder:
            pruned.save_pretrained(folder)
            loaded = type(pruned).from_pretrained(folder).eval()
        with torch.no_grad():
            same = torch.equal(pruned(input_ids=text.held).logits, loaded(input_ids=text.held).logits)
        made = [generated(m, prompt, cache) for m in (pruned, loaded) for cache in (True, False)]
        config = loaded.config
        yield {
            "flops asked": share,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": f"{config.num_attention_heads} / {config.num_key_value_heads}",
            "perplexity": perplexity(loaded, text.held),
            "same outputs": same,
            "same text": torch.equal(made[0], made[2]),
            "same without a cache": torch.equal(made[0], made[1]) and torch.equal(made[2], made[3]),
        }


def generated(model: Any, prompt: Tensor, cache: bool) -> Tensor:
    """Continue texts by the most likely characters."""
    return model.generate(prompt, max_new_tokens=48, do_sample=False, use_cache=cache, pad_token_id=0)


# --- sizes

SIZES = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "0.3B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
}
MEASURED = {
    "prune_filters, half of the FLOPs": ("0.1B", "0.3B"),
    "prune_obs, blocked, not in sequence": ("0.1B",),
    "SparseGPT, llm-compressor": ("0.1B",),
}


def sizes(model: nn.Module, text: Text) -> Iterator[Row]:
    """Measure larger models, each in a process of its own."""
    for what, names in MEASURED.items():
        for name in names:
            command = [sys.executable, "-m", "benchmarks.language", "--one", what, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed = (done.stderr.strip().splitlines() or ["killed"])[-1][:300]
                yield {"what": what, "size": name, "failed": failed}
            else:
                yield {"what": what, "size": name, **json.loads(done.stdout.splitlines()[-1])}


def measure(what: str, size: str) -> Row:
    """Measure one call in this process: seconds, and the highest memory, model included."""
    torch.manual_seed(0)
    model = llama(**SIZES[size], num_key_value_heads=4, vocab_size=16000, max_position_embeddings=256)
    batches = [torch.randint(16000, (1, CONTEXT)) for _ in range(16)]
    obs = partial(prune_obs, amount=0.5, solver="blocked", batches=batches, forward=run, ignore=[HEAD], progress=False)
    calls: dict[str, Prune] = {
        "prune_filters, half of the FLOPs": partial(
            prune_filters, example_inputs=example(16000), amount=0.5, target="flops", progress=False
        ),
        "prune_obs, blocked, not in sequence": obs,
        "SparseGPT, llm-compressor": partial(
            by_llm_compressor, batches=batches, modifier="SparseGPTModifier", amount=0.5, pattern=None
        ),
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    seconds = timed(calls[what], model)
    return {
        "parameters": parameters,
        "seconds": seconds,
        "model GB": held / 1e9,
        "peak GB": resident("VmHWM") / 1e9,
    }


# --- all of them


def example(characters: int) -> dict[str, Any]:
    """Return inputs to trace a model on."""
    return {"input_ids": torch.arange(32)[None] % characters, "use_cache": False}


def run(model: nn.Module, batch: Tensor) -> Any:
    """Call a model on tokens."""
    return model(input_ids=batch, use_cache=False)


def timed(prune: Prune, model: nn.Module) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    prune(model)
    return time.process_time() - start


def table_of(title: str, rows: list[Row]) -> Table:
    """Lay out rows, in the order of their first keys."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[-1].get(column, ""), str) else "right")
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    return table


TABLES = {"weights": weights, "widths": widths, "saving": saving, "sizes": sizes}


def main() -> None:
    """Read the command line, make the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=[*TABLES])
    parser.add_argument("--pieces", type=int, default=64, help="for calibration")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["LLM_COMPRESSOR_LOG_LEVEL"] = "CRITICAL"
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    text = read(options.data, options.pieces, held=128)
    model = trained(text)
    found: dict[str, list[Row]] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        found[name] = []
        for row in TABLES[name](model, text):
            found[name].append(row)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            Console(width=140).print(row)
    for name, rows in found.items():
        Console(width=140).print(table_of(name, rows))


if __name__ == "__main__":
    main()
