"""The digits example from the command line: options of the run, of the model and of pruning can be set in YAML.

python examples/digits_cli.py fit --config examples/digits.yaml
python examples/digits_cli.py fit --config examples/digits.yaml --trainer.callbacks.amount=0.7
python examples/digits_cli.py fit --trainer.callbacks.help=FilterL1Pruning
"""

from digits import Digits, DigitsNet
from lightning.pytorch.cli import LightningCLI

import lightning_prune  # noqa: F401  # registers the short names of the callbacks

if __name__ == "__main__":
    LightningCLI(DigitsNet, Digits)
