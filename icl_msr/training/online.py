"""A probe and a kNN classifier that measure the encoder during training, on a held-out part of the training split."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from icl_msr.core.distributed import gather
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import knn_predict
from icl_msr.evaluation.linear import hold_out
from icl_msr.training.module import Pretraining
from icl_msr.training.progress import last_epoch


class OnlineEvaluation(pl.Callback):
    """Logs `online/knn` (preset dino) and `online/probe` every few epochs.

    The probe is softmax regression from zero on detached features, trained with Adam on every batch beside the encoder,
    and is the same on all ranks. There is no probe if the labels belong to another data set. Pre-training uses the
    held-out images without their labels. Neither the probe nor the kNN bank ever sees their labels.
    """

    def __init__(
        self,
        dataset: Dataset,
        channels: int,
        *,
        every_n_epochs: PositiveInt,
        seed: int,
        bank: PositiveInt,
        queries: PositiveInt,
    ):
        self.dataset, self.every_n_epochs = dataset.evaluated, every_n_epochs
        self.probed = dataset.labelled is None
        """True if the probe is trained. It needs labels of the images that are trained on."""
        dataset = dataset.evaluated
        train = dataset.train
        fit, self.held = hold_out(len(train), min(queries / len(train), 0.5), seed)
        self.fit = fit[train.labels.cpu()[fit] >= 0]
        self.held = self.held[train.labels.cpu()[self.held] >= 0] if dataset.classified else self.held[:0]
        self.bank = self.fit[torch.linspace(0, len(self.fit) - 1, min(bank, len(self.fit))).long()]
        self.fits = torch.zeros(len(train), dtype=torch.bool)
        self.fits[self.fit] = True
        self.probe = nn.Linear(channels, max(1, len(dataset.classes)))  # an empty layer is a warning of torch
        nn.init.zeros_(self.probe.weight)
        nn.init.zeros_(self.probe.bias)
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=3e-3)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        self.probe.to(device)
        self.fits = self.fits.to(device)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"probe": self.probe.state_dict(), "optimizer": self.optimizer.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.probe.load_state_dict(state_dict["probe"])
        self.optimizer.load_state_dict(state_dict["optimizer"])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.probed:
            return
        assert isinstance(pl_module, Pretraining)
        assert pl_module.latest is not None
        assert pl_module.latest.output is not None
        views = pl_module.latest.views
        features = gather(pl_module.latest.output.features[0].detach().float())
        labels = gather(views.labels.masked_fill(~self.fits[views.index], -1))
        features = F.layer_norm(features, features.shape[1:])
        with torch.enable_grad():
            loss = F.cross_entropy(self.probe(features), labels, ignore_index=-1)
        if loss.isfinite():
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0 or last_epoch(trainer)
        if not due or not len(self.held):
            return
        assert isinstance(pl_module, Pretraining)
        # The first rank measures and sends the values to all, since a callback must decide alike on all ranks.
        accuracies = self.accuracies(pl_module) if trainer.is_global_zero else {}
        pl_module.log_dict(trainer.strategy.broadcast(accuracies))

    def accuracies(self, pl_module: Pretraining) -> dict[str, float]:
        """Return the accuracies of kNN and probe on the held-out images, in [0, 1]."""
        device = pl_module.device
        features = self._features(pl_module, torch.cat([self.bank, self.held]))
        bank, queries = features[: len(self.bank)], features[len(self.bank) :]
        train_labels = self.dataset.train.labels.to(device)
        labels = train_labels[self.held.to(device)]
        knn = knn_predict(bank, train_labels[self.bank.to(device)], queries, "dino", len(self.dataset.classes))
        with torch.no_grad():
            probe = self.probe(F.layer_norm(queries, queries.shape[1:])).argmax(1)
        found = {"online/knn": _share(knn == labels), "online/probe": _share(probe == labels)}
        return found if self.probed else {"online/knn": found["online/knn"]}

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


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())
