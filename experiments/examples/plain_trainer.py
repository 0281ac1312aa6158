"""Train our LightningModule and DataModule with your own Trainer and torch Dataset. A second call resumes the first.

python experiments/examples/plain_trainer.py FOLDER
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from icl_msr.core.config import build, config_dir
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.methods import MoCo
from icl_msr.models.backbones import tiny
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.training.datamodule import DataModule
from icl_msr.training.module import Pretraining
from icl_msr.training.optimization import Optimization, cosine

MOCO = {"hidden_dim": 64, "embedding_dim": 32, "batch_norm": True, "temperature": 0.2, "queue_size": 64}
SCHEDULE = partial(cosine, warmup_steps=0, warmup_epochs=0.0, scale_lr="none")
EPOCHS, BATCH = 2, 16


class Stripes(TorchDataset[tuple[Tensor, int]]):
    """A torch Dataset of uint8 images (3, S, S) and labels. Any such data set works."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.randint(0, 200, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        image[:, :: 2 + index % 2] += 55
        return image, index % 2


def main(folder: Path, callbacks: Sequence[pl.Callback] = ()) -> Pretraining:
    """Train in this folder, from where an earlier call ended, and return the trained module."""
    pl.seed_everything(0)
    images, labels = zip(*(Stripes()[i] for i in range(len(Stripes()))), strict=True)
    train = ArraySplit(torch.stack(images), torch.tensor(labels))
    data = Dataset("stripes", ("every second row", "every third row"), 32, train, tests={})
    augmentation = build(OmegaConf.to_container(OmegaConf.load(config_dir() / "augment" / "small.yaml")))  # type: ignore[arg-type]

    method = MoCo(tiny(32, weights=None), **MOCO, momentum=0.99, momentum_statistics="own")  # type: ignore[arg-type]
    regularizer = MetaSemanticRegularizer.with_defaults(method.channels, method.temperature, seed=0)
    optimization = Optimization(partial(torch.optim.Adam, lr=1e-3), SCHEDULE)
    module = Pretraining(method, regularizer, optimization, seed=0, batch_size=BATCH)
    loader = DataModule(data, augmentation, None, batch_size=BATCH, num_workers=0, seed=0, channels_last=False)

    checkpoints, last = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True), folder / "last.ckpt"
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=[checkpoints, *callbacks], default_root_dir=folder, logger=False)
    trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
