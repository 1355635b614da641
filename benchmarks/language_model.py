"""A small character Llama trained on a text, its batches, and its perplexity; knows nothing of pruning."""

import contextlib
import importlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # where torchvision was built for another device; before Lightning imports it
    importlib.import_module("torchvision_cpu")

from benchmarks.data import pieces, shakespeare

__all__ = ["CONTEXT", "Text", "llama", "loss", "perplexity", "read", "trained"]

CONTEXT = 128
STEPS, WARM_UP, BATCH, RATE = 800, 60, 8, 3e-3
KEPT = Path(__file__).with_name("checkpoints") / "language.pt"  # git ignores this folder


class Text(NamedTuple):
    """What is trained on, calibrated with and tested on, ``(pieces, CONTEXT + 1)`` each but for the first."""

    train: Tensor
    calibration: Tensor
    held: Tensor
    characters: int


def read(data: str, calibration: int, held: int) -> Text:
    """Read the text; the last tenth is held out."""
    train, rest, characters = shakespeare(data)
    draw = torch.Generator().manual_seed(1)
    return Text(train, pieces(train, calibration, CONTEXT, draw), pieces(rest, held, CONTEXT, draw), characters)


def llama(**config: int | bool) -> nn.Module:
    """Build a Llama without special tokens."""
    library = importlib.import_module("transformers")
    return library.LlamaForCausalLM(library.LlamaConfig(bos_token_id=None, eos_token_id=None, **config)).eval()


def trained(text: Text) -> nn.Module:
    """Return the trained model; its weights are kept in a file, and read from there if they are there already."""
    torch.manual_seed(0)
    model = llama(
        hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=text.characters, max_position_embeddings=2 * CONTEXT,
    )  # fmt: skip
    if KEPT.exists():
        model.load_state_dict(torch.load(KEPT))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for step in range(STEPS):
        anneal = 0.55 + 0.45 * math.cos(math.pi * step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, anneal)
        optimizer.zero_grad()
        loss(model, pieces(text.train, BATCH, CONTEXT, draw)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    KEPT.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), KEPT)
    return model.eval()


def loss(model: nn.Module, text: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next character."""
    logits = model(input_ids=text[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def perplexity(model: nn.Module, text: Tensor) -> float:
    """Return the exponential of the mean cross-entropy over all pieces."""
    with torch.no_grad():
        losses = [float(loss(model, part)) for part in text.split(64)]
    return math.exp(sum(losses) / len(losses))
