"""The digits example with options of pruning that a sweep can set by name.

python examples/digits_sweep.py fit --pruning.amount=0.7 --trainer.max_epochs=16
for amount in 0.3 0.5 0.7; do python examples/digits_sweep.py fit --pruning.amount=$amount; done
"""

from digits import Digits, DigitsNet
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune import FilterL1Pruning


class SweepCLI(LightningCLI):
    """Adds a pruning callback to every run, with options under a name of its own."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(FilterL1Pruning, "pruning")
        schedule = {"class_path": "Cubic", "init_args": {"start": 4, "end": 12, "every": 2}}
        parser.set_defaults({"pruning.target": "flops", "pruning.schedule": schedule})


if __name__ == "__main__":
    SweepCLI(DigitsNet, Digits)
