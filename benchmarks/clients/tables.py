"""Clients on tables, cells and graphs."""

from pathlib import Path
from typing import Any

from benchmarks.clients.finished import Finished, plain


def scvi_tools(callback: Any, folder: Path) -> Finished:
    """Train the variational autoencoder of single cells."""
    import anndata
    import numpy as np
    import scvi

    counts = np.random.default_rng(0).poisson(2.0, (128, 40)).astype(np.float32)
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=32, n_latent=4)
    model.train(max_epochs=3, batch_size=32, callbacks=[callback], accelerator="cpu", enable_progress_bar=False)
    return Finished(
        model.module,
        lambda: model.get_latent_representation(),
        lambda path: model.save(str(path / "model"), overwrite=True),
        lambda path: scvi.model.SCVI.load(str(path / "model"), adata=cells, accelerator="cpu")
        .get_latent_representation(),
    )  # fmt: skip


def pytorch_tabular(callback: Any, folder: Path) -> Finished:
    """Train a classifier with embedded categories."""
    import numpy as np
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    chance = np.random.default_rng(0)
    table = pd.DataFrame(chance.normal(size=(200, 4)), columns=list("abcd"))
    table["kind"] = chance.choice(["u", "v", "w"], 200)
    table["label"] = (table["a"] + table["b"] > 0).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["label"], continuous_cols=list("abcd"), categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="32-16"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            max_epochs=3, batch_size=32, accelerator="cpu", progress_bar="none", checkpoints=None, load_best=False,
            early_stopping=None, checkpoints_path=str(folder),
        ),
        verbose=False,
    )  # fmt: skip
    model.fit(train=table, callbacks=[callback])

    def predict(of: Any) -> Any:
        return of.predict(table).filter(like="probability").to_numpy()

    return Finished(
        model.model,
        lambda: predict(model),
        lambda path: model.save_model(str(path / "model")),
        lambda path: predict(TabularModel.load_model(str(path / "model"))),
    )


def pyg(callback: Any, folder: Path) -> Finished:
    """Train a graph network on small graphs."""
    import lightning.pytorch as pl
    import torch
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCN, global_mean_pool

    class Graphs(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = GCN(8, 32, num_layers=3, out_channels=16)
            self.head = torch.nn.Linear(16, 2)

        def forward(self, data: Any) -> Any:
            return self.head(global_mean_pool(self.net(data.x, data.edge_index), data.batch))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch), batch.y)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    graphs = []
    for i in range(32):
        edges = torch.randint(10, (2, 30))
        graphs.append(Data(x=torch.randn(10, 8), edge_index=edges, y=torch.tensor([i % 2])))
    loader = DataLoader(graphs, batch_size=8)
    return plain(Graphs, loader, next(iter(loader)), callback, folder)
