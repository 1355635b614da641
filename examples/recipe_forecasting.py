"""Train a forecaster of neuralforecast by its own API, and prune a third of its parameters on the way.

python examples/recipe_forecasting.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

from lightning_prune import FilterL1Pruning, Linear, slim_loading
from lightning_prune.surgery.loading import recipe_json

HORIZON = 8


def waves(days: int = 160) -> pd.DataFrame:
    """Sums of waves in the form that neuralforecast reads: put your own series here."""
    dates = pd.date_range("2024-01-01", periods=days, freq="D")
    steps = np.arange(days)
    frames = []
    for number in range(4):
        values = np.sin(2 * np.pi * steps / (7 + number)) + 0.1 * number
        frames.append(pd.DataFrame({"unique_id": str(number), "ds": dates, "y": values}))
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, help="folder for the model; by default it is deleted again")
    options = parser.parse_args()
    table = waves()
    known = table[table.ds < table.ds.max() - pd.Timedelta(days=HORIZON - 1)]
    # Keywords that neuralforecast does not know go to the Trainer: callbacks among them.
    pruning = FilterL1Pruning(
        amount=0.33, target="params", schedule=Linear(start=20, end=60, every=20, by="steps"), trace="training_step"
    )
    model = NHITS(
        h=HORIZON,
        input_size=3 * HORIZON,
        max_steps=options.steps,
        mlp_units=[[64, 64]] * 3,
        callbacks=[pruning],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    dense = sum(parameter.numel() for parameter in model.parameters())
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(known)
    kept = sum(parameter.numel() for parameter in forecast.models[0].parameters()) / dense
    predicted = forecast.predict()["NHITS"].to_numpy()
    true = table.groupby("unique_id").tail(HORIZON).y.to_numpy()
    error = float(np.abs(predicted - true).mean())
    with TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch) / "model"
        forecast.save(str(folder), overwrite=True)
        # The library copies the weights into a plain dict, which loses what they tell of their shapes: keep that, too.
        (folder / "recipe.json").write_text(recipe_json(forecast.models[0]))
        with slim_loading((folder / "recipe.json").read_text()):  # the library builds the full-size network, and loads
            again = NeuralForecast.load(str(folder)).predict()["NHITS"].to_numpy()
    same = "the same" if np.allclose(again, predicted, atol=1e-6) else "other"
    print(f"{kept:.1%} of the parameters kept; mean error {error:.3f}; loaded again: {same} forecasts")


if __name__ == "__main__":
    main()
