"""Train SimCLR with stable-pretraining as its readme does; the words are FILE BACKBONE EPOCHS BATCH."""

import sys
from typing import Any

import lightning as pl
import numpy as np
import stable_pretraining as spt
import torch
from PIL import Image
from stable_pretraining import forward
from stable_pretraining.data import transforms
from torch import nn
from torch.utils.data import DataLoader, Dataset

from icl_msr.models.backbones import resnet, tiny


class Images(Dataset[tuple[Image.Image, int]]):
    """Images in memory as PIL images, as torchvision's CIFAR10 returns them."""

    def __init__(self, file: str):
        with np.load(file) as arrays:
            self.images, self.labels = arrays["train_images"], arrays["train_labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[i]), int(self.labels[i])


def view() -> Any:
    """Return the transform of a view."""
    return transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.ToImage(**spt.data.static.CIFAR10),
    )


def main() -> None:
    """Train and save the encoder."""
    file, name, epochs, batch = sys.argv[1:]
    data = spt.data.FromTorchDataset(
        Images(file), names=["image", "label"], transform=transforms.MultiViewTransform([view(), view()])
    )
    loader = DataLoader(data, batch_size=int(batch), shuffle=True, drop_last=True, num_workers=2)
    body = tiny(32, weights=None) if name == "tiny" else resnet(32, name=name, stem="auto", weights=None)
    head = nn.Sequential(nn.Linear(body.channels, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 64))
    module = spt.Module(
        backbone=body,
        projector=head,
        forward=forward.simclr,
        simclr_loss=spt.losses.NTXEntLoss(temperature=0.2),
        optim={"optimizer": {"type": "Adam", "lr": 1e-3}},
    )
    trainer = pl.Trainer(
        max_epochs=int(epochs), accelerator="cpu", devices=1, enable_progress_bar=False, num_sanity_val_steps=0
    )
    spt.Manager(trainer=trainer, module=module, data=spt.data.DataModule(train=loader), seed=0)()
    torch.save(body.state_dict(), "encoder.pt")


if __name__ == "__main__":
    main()
