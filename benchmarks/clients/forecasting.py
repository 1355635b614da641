"""Clients that forecast time series."""

from pathlib import Path
from typing import Any

from benchmarks.clients.finished import QUIET, Finished, trained


def pytorch_forecasting(callback: Any, folder: Path) -> Finished:
    """Train a temporal fusion transformer on sums of waves."""
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    steps = np.arange(80)
    frames = [pd.DataFrame({"t": steps, "group": str(i), "value": np.sin(steps / (3 + i)) + i}) for i in range(4)]
    data = TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True), time_idx="t", target="value", group_ids=["group"], max_encoder_length=16,
        max_prediction_length=4, time_varying_unknown_reals=["value"], time_varying_known_reals=["t"],
    )  # fmt: skip
    loader = data.to_dataloader(train=True, batch_size=16, num_workers=0)
    model = TemporalFusionTransformer.from_dataset(data, hidden_size=16, attention_head_size=2, dropout=0.0)
    trainer = trained(model, [loader], callback, folder)
    fixed = data.to_dataloader(train=False, batch_size=16, num_workers=0)

    def predict(of: Any) -> Any:
        return of.predict(fixed, trainer_kwargs={"accelerator": "cpu", "logger": False, "enable_progress_bar": False})

    def predict_loaded(path: Path) -> Any:
        return predict(TemporalFusionTransformer.load_from_checkpoint(path / "model.ckpt", weights_only=False))

    return Finished(
        model,
        lambda: predict(model),
        lambda path: trainer.save_checkpoint(path / "model.ckpt"),
        predict_loaded,
    )


def neuralforecast(callback: Any, folder: Path) -> Finished:
    """Train NHITS."""
    import numpy as np
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    days = pd.date_range("2024-01-01", periods=120, freq="D")
    frames = [pd.DataFrame({"unique_id": str(i), "ds": days, "y": np.sin(np.arange(120) / (4 + i))}) for i in range(4)]
    table = pd.concat(frames, ignore_index=True)
    model = NHITS(
        h=8, input_size=24, max_steps=8, mlp_units=[[32, 32]] * 3, batch_size=4, callbacks=[callback],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        default_root_dir=str(folder),
    )  # fmt: skip
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(table)
    return Finished(
        forecast.models[0],
        lambda: forecast.predict()["NHITS"].to_numpy(),
        lambda path: forecast.save(str(path / "model"), overwrite=True),
        lambda path: NeuralForecast.load(str(path / "model")).predict()["NHITS"].to_numpy(),
    )


def darts(callback: Any, folder: Path) -> Finished:
    """Train a temporal convolutional network."""
    import numpy as np
    from darts import TimeSeries
    from darts.models import TCNModel

    series = TimeSeries.from_values(np.sin(np.arange(160) / 5).astype(np.float32))
    model = TCNModel(
        input_chunk_length=24, output_chunk_length=8, num_filters=8, n_epochs=3, batch_size=32, dropout=0.0,
        random_state=0, pl_trainer_kwargs={"callbacks": [callback], **QUIET},
    )  # fmt: skip
    model.fit(series)
    return Finished(
        model.model,
        lambda: model.predict(8).values(),
        lambda path: model.save(str(path / "model.pt")),
        lambda path: TCNModel.load(str(path / "model.pt"), trusted=True).predict(8).values(),
    )


def gluonts(callback: Any, folder: Path) -> Finished:
    """Train a feed-forward network that predicts a distribution."""
    import numpy as np
    import pandas as pd
    import torch
    from gluonts.dataset.common import ListDataset
    from gluonts.model.predictor import Predictor
    from gluonts.torch import SimpleFeedForwardEstimator

    rows = [{"start": pd.Period("2024-01-01", freq="D"), "target": np.sin(np.arange(120) / (4 + i))} for i in range(4)]
    data = ListDataset(rows, freq="D")
    estimator = SimpleFeedForwardEstimator(
        prediction_length=8, hidden_dimensions=[32, 32], num_batches_per_epoch=4, batch_size=8,
        trainer_kwargs={"max_epochs": 3, "callbacks": [callback], "default_root_dir": str(folder), **QUIET},
    )  # fmt: skip
    predictor = estimator.train(data)

    def predict(of: Any) -> Any:
        torch.manual_seed(0)  # it samples
        return np.stack([forecast.mean for forecast in of.predict(data)])

    return Finished(
        predictor.prediction_net,
        lambda: predict(predictor),
        lambda path: predictor.serialize(path),
        lambda path: predict(Predictor.deserialize(path)),
    )
