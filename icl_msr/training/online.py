"""A probe and a kNN that watch the encoder learn, on a held-out part of the training split."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_msr.core.distributed import gather
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import knn_predict
from icl_msr.evaluation.linear import hold_out
from icl_msr.training.module import Pretraining


class OnlineEvaluation(pl.Callback):
    """Logs `online/knn` (preset dino) and `online/probe` every few epochs.

    The probe is softmax regression from zero on detached features, trained with Adam on every batch beside the encoder,
    the same on all ranks; there is none where the labels are those of another data set. The held-out images are
    pre-trained on without their labels; neither the probe nor the kNN bank ever sees those.
    """

    def __init__(
        self,
        dataset: Dataset,
        channels: int,
        *,
        every_n_epochs: int,
        seed: int,
        bank: int = 4000,
        queries: int = 1000,
    ):
        self.dataset, self.every_n_epochs = dataset.evaluated, every_n_epochs
        self.probed = dataset.labelled is None
        """Is the probe trained? It sees the features of training images, which must have the labels."""
        dataset = dataset.evaluated
        train = dataset.train
        fit, self.held = hold_out(len(train), min(queries / len(train), 0.5), seed)
        self.fit = fit[train.labels.cpu()[fit] >= 0]
        self.held = self.held[train.labels.cpu()[self.held] >= 0]
        self.bank = self.fit[torch.linspace(0, len(self.fit) - 1, min(bank, len(self.fit))).long()]
        self.fits = torch.zeros(len(train), dtype=torch.bool)
        self.fits[self.fit] = True
        self.probe = nn.Linear(channels, len(dataset.classes))
        nn.init.zeros_(self.probe.weight)
        nn.init.zeros_(self.probe.bias)
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=3e-3)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """To the training device."""
        device = trainer.strategy.root_device
        self.probe.to(device)
        self.fits = self.fits.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The probe and its Adam, for the checkpoint."""
        return {"probe": self.probe.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.probe.load_state_dict(state_dict["probe"])
        self.optimizer.load_state_dict(state_dict["optimizer"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the probe."""
        if not self.probed:
            return
        assert isinstance(pl_module, Pretraining)
        assert pl_module.batch is not None
        views = pl_module.batch.views
        features = gather(pl_module.batch.output.features[0].detach().float())
        labels = gather(views.labels.masked_fill(~self.fits[views.index], -1))
        features = F.layer_norm(features, features.shape[1:])
        with torch.enable_grad():
            loss = F.cross_entropy(self.probe(features), labels, ignore_index=-1)
        if loss.isfinite():
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Both accuracies on the held-out images, measured by the first rank."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if ((trainer.current_epoch + 1) % self.every_n_epochs and not last) or not len(self.held):
            return
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Pretraining)
        device = pl_module.device
        features = self._features(pl_module, torch.cat([self.bank, self.held]))
        bank, queries = features[: len(self.bank)], features[len(self.bank) :]
        train_labels = self.dataset.train.labels.to(device)
        labels = train_labels[self.held.to(device)]
        knn = knn_predict(bank, train_labels[self.bank.to(device)], queries, "dino", len(self.dataset.classes))
        with torch.no_grad():
            probe = self.probe(F.layer_norm(queries, queries.shape[1:])).argmax(1)
        pl_module.log("online/knn", (knn == labels).float().mean(), rank_zero_only=True)
        if self.probed:
            pl_module.log("online/probe", (probe == labels).float().mean(), rank_zero_only=True)

    def _features(self, module: Pretraining, index: Tensor) -> Tensor:
        data = self.dataset
        return extract(
            module.method.backbone,
            data.train,
            mean=data.mean,
            std=data.std,
            device=module.device,
            batch_size=500,
            label="online features",
            index=index,
        ).to(module.device)
