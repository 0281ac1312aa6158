"""Train SimCLR with lightly as its documentation does; the words are FILE BACKBONE EPOCHS BATCH."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icl_msr.models.backbones import resnet, tiny


class Images(Dataset[Any]):
    """Images in memory with a transform, as torchvision's CIFAR10."""

    def __init__(self, file: str, transform: Callable[[Image.Image], Any]):
        with np.load(file) as arrays:
            self.images, self.labels = arrays["train_images"], arrays["train_labels"]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class SimCLR(pl.LightningModule):
    """The example's module."""

    def __init__(self, name: str):
        super().__init__()
        self.backbone = tiny(32, weights=None) if name == "tiny" else resnet(32, name=name, stem="auto", weights=None)
        self.head = SimCLRProjectionHead(self.backbone.channels, 512, 64)
        self.loss = NTXentLoss(0.2)

    def training_step(self, batch: tuple[list[Tensor], Tensor], _: int) -> Tensor:
        """Return the loss of two views."""
        first, second = (self.head(self.backbone(view)) for view in batch[0])
        loss: Tensor = self.loss(first, second)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def main() -> None:
    """Train and save the encoder."""
    file, name, epochs, batch = sys.argv[1:]
    views = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.2)
    loader = DataLoader(Images(file, views), batch_size=int(batch), shuffle=True, drop_last=True, num_workers=2)
    model = SimCLR(name)
    pl.Trainer(max_epochs=int(epochs), accelerator="cpu", devices=1, enable_progress_bar=False).fit(model, loader)
    torch.save(model.backbone.state_dict(), "encoder.pt")


if __name__ == "__main__":
    main()
