"""Trains a small character transformer on the Zen of Python while attention heads and hidden units leave it.

python examples/transformer.py
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import TaylorFilterPruning, count_flops
from lightning_prune.algorithms.schedules import FewUnits

CONTEXT = 32
ONE_TEXT = torch.zeros(1, CONTEXT, dtype=torch.long)


def zen() -> str:
    """Return the poem that comes with Python."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


class Block(nn.Module):
    """Attention and a hidden layer beside a residual stream, written as most people write them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (
            part(y).view(batch, length, self.num_heads, self.head_width).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(seen.reshape(batch, length, self.num_heads * self.head_width))
        return x + self.hidden(self.norm2(x))


class CharacterModel(pl.LightningModule):
    """Foretells the next character."""

    def __init__(self, characters: int, width: int = 48, num_heads: int = 6, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        self.example_input_array = ONE_TEXT

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(characters) + self.place)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        before, after = batch
        loss = F.cross_entropy(self(before).flatten(0, 1), after.flatten())
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main() -> None:
    """Train, prune, and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    text = zen()
    alphabet = sorted(set(text))
    numbers = torch.tensor([alphabet.index(character) for character in text])
    windows = numbers.unfold(0, CONTEXT + 1, 2)
    data = DataLoader(TensorDataset(windows[:, :-1], windows[:, 1:]), batch_size=32, shuffle=True)

    model = CharacterModel(len(alphabet))
    before = count_flops(model, ONE_TEXT).total
    pruning = TaylorFilterPruning(
        amount=0.4,
        target="flops",
        scope="layer",
        schedule=FewUnits(units=40, every=len(data), start=2 * len(data)),
        ignore=["embed", "place"],  # the residual stream stays as wide as it is
    )
    trainer = pl.Trainer(
        max_epochs=options.epochs, callbacks=[pruning], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, data)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    heads = [block.num_heads for block in blocks]
    hidden = [block.hidden[0].out_features for block in blocks]
    left = count_flops(model, ONE_TEXT).total / before
    loss = float(trainer.callback_metrics["loss"])
    print(f"{left:.1%} of the FLOPs left; heads {heads}, hidden units {hidden}; loss {loss:.3f}")


if __name__ == "__main__":
    main()
