"""Prune a classifier and a small decoder of Hugging Face, and save them so that `from_pretrained` loads them.

python examples/recipe_hugging_face.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_prune import FilterL1Pruning, Linear

WORDS = 100


class Tuned(pl.LightningModule):
    """Fine-tunes any model of transformers that returns its loss where it gets labels."""

    def __init__(self, net: PreTrainedModel) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def classifier() -> PreTrainedModel:
    """Random weights, so that the example runs offline: from_pretrained("bert-base-uncased") for yours."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=3, **sizes))


def decoder() -> PreTrainedModel:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **sizes))


def batches(of_words: bool) -> DataLoader:
    """Random words; the labels of a decoder are the words themselves."""
    rows: Any = []
    for _ in range(32):
        words = torch.randint(WORDS, (16,))
        label = words if of_words else torch.randint(3, ())
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": label})
    return DataLoader(rows, batch_size=8)


def prune(net: PreTrainedModel, of_words: bool) -> float:
    """Fine-tune and prune; return the fraction of parameters that is kept."""
    pruning = FilterL1Pruning(
        amount=0.4,
        target="params",
        uniform=True,  # one width for all blocks, which a config can express
        module="net",
        schedule=Linear(start=1, end=2),
        trace="training_step",  # the batch is a dict of keywords, and there is no forward
    )
    trainer = pl.Trainer(max_epochs=3, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Tuned(net), batches(of_words))
    return float(trainer.callback_metrics["prune/params_kept"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the models; by default they are deleted again")
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    words = torch.randint(WORDS, (1, 16))
    with TemporaryDirectory() as scratch:
        for name, net in (("classifier", classifier()), ("decoder", decoder())):
            folder = (options.out or Path(scratch)) / name
            kept = prune(net, name == "decoder")
            net.save_pretrained(folder)
            again = type(net).from_pretrained(folder)  # plain transformers, nothing of ours
            same = torch.allclose(again.eval()(words).logits, net.eval()(words).logits, atol=1e-5)
            size = f"feed-forward width {again.config.intermediate_size}, {again.config.num_attention_heads} heads"
            print(f"{name}: {kept:.1%} of the parameters kept; {size}; {'the same' if same else 'different'} outputs")


if __name__ == "__main__":
    main()
