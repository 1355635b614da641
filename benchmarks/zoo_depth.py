"""Removes each layer of every network of a zoo alone: how many removals are verified, and whether any is wrong.

    python -m benchmarks.zoo_depth                        # transformers, small configurations
    python -m benchmarks.zoo_depth --zoo torchvision
    python -m benchmarks.zoo_depth --models llama gpt2    # some of them

Weights are random, as in ``benchmarks/zoo.py``. A removal that is verified is made on a copy. It is wrong where the
copy's first output is not that of the full network, in which a hook returns what the layer was given (or zeros, where
the layer is only added to something); or where a decoder that generated the same tokens with and without a cache no
longer does. Each network runs in a process of its own. Results are written to ``zoo-depth-NAME.json`` network by
network; networks that are there already are not run again unless they are named.
"""

import argparse
import copy
import json
import multiprocessing
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.zoo import randomised
from benchmarks.zoos import ZOOS, Inputs
from lightning_prune.model.calls import run, tensors_in
from lightning_prune.model.sandbox import undisturbed
from lightning_prune.structure.skippable import find_skippable
from lightning_prune.surgery.pass_through import passed, skip_of
from lightning_prune.surgery.remove_layers import remove_layers_
from lightning_prune.surgery.verify_skips import verify_skips

HERE = Path(__file__).parent
TOLERANCE = 1e-4
NEW_TOKENS = 4
Found = dict[str, Any]


def first_output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the first floating-point output of a model in eval mode."""
    torch.manual_seed(0)
    with undisturbed(model, inputs), torch.no_grad():
        return next(tensor for tensor in tensors_in(run(model, inputs)) if tensor.is_floating_point())


def with_hook(model: nn.Module, path: str, skip: dict[str, Any]) -> nn.Module:
    """Return a copy of a model in which a hook replaces what a layer returns."""
    twin = copy.deepcopy(model)

    def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return passed(skip, args, kwargs)

    twin.get_submodule(path).register_forward_hook(replace, with_kwargs=True)
    return twin


def generates_alike(model: Any, inputs: Inputs) -> bool | None:
    """Return whether a decoder gives the same tokens with and without a cache; None if it generates nothing."""
    tokens = inputs.get("input_ids") if isinstance(inputs, dict) else None
    if tokens is None or not hasattr(model, "generate"):
        return None
    given = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    try:
        with torch.no_grad():
            return torch.equal(*[model.generate(tokens, use_cache=cached, **given) for cached in (True, False)])
    except Exception:
        return None


def removed(name: str, zoo: str) -> Found:
    """Remove each layer of one network from a copy, and count what was verified and what is wrong."""
    torch.manual_seed(0)
    model, inputs = ZOOS[zoo].build(name)
    model = randomised(model)
    depth = find_skippable(model, inputs)
    generates = generates_alike(model, inputs)
    reasons: list[str] = []
    wrong: list[str] = []
    cached = 0
    for path, layer in depth.layers.items():
        skip = skip_of(layer)
        proof = verify_skips(model, inputs, {path: skip})
        if proof.wrong:
            reasons.append(f"{path}: {proof.wrong}"[:200])
            continue
        expected = first_output(with_hook(model, path, skip), inputs)
        slim = copy.deepcopy(model)
        remove_layers_(slim, {path: skip})
        found = first_output(slim, inputs)
        scale = expected.abs().max().clamp(min=1e-6)
        if found.shape != expected.shape or (found - expected).abs().max() > TOLERANCE * scale:
            wrong.append(path)
        elif generates:
            alike = generates_alike(slim, inputs)
            cached += bool(alike)
            if alike is False:
                wrong.append(f"{path} with a cache")
    verified = len(depth.layers) - len(reasons)
    return {
        "layers": len(depth.layers), "verified": verified, "wrong": wrong, "refused": reasons,
        "generates": generates, "right with a cache": cached,
    }  # fmt: skip


def tell(sender: Connection, name: str, zoo: str) -> None:
    """Send what came of one network."""
    start = time.process_time()
    try:
        found = removed(name, zoo)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    sender.send({**found, "seconds": round(time.process_time() - start, 1)})


def in_a_process(name: str, zoo: str, limit: float) -> Found:
    """Try one network in a process of its own."""
    fork = multiprocessing.get_context("fork")  # libraries are imported once
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=tell, args=(sender, name, zoo))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            found: Found = receiver.recv()
            return found
        return {"error": f"not done in {limit:g} seconds"}
    except EOFError:
        return {"error": "died"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", choices=sorted(ZOOS), default="transformers")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each network")
    options = parser.parse_args()
    path = HERE / f"zoo-depth-{options.zoo}.json"
    results: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {}
    console = Console()
    for name in options.models or [name for name in ZOOS[options.zoo].names() if name not in results]:
        results[name] = in_a_process(name, options.zoo, options.limit)
        console.print(name, results[name])
        path.write_text(json.dumps(results, indent=1) + "\n")
    done = [row for row in results.values() if "error" not in row]
    total = Counter({key: sum(row[key] for row in done) for key in ("layers", "verified", "right with a cache")})
    with_layers = sum(row["layers"] > 0 for row in done)
    console.print(
        f"{with_layers} of {len(done)} networks have removable layers ({len(results)} tried); "
        f"{total['verified']} of {total['layers']} removals verified, {sum(len(row['wrong']) for row in done)} wrong; "
        f"{total['right with a cache']} generate the same tokens with a cache"
    )


if __name__ == "__main__":
    main()
