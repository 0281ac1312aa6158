"""The module and the data in a `pl.Trainer(...)` that we did not make, as in a script of the user's own."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from support.programs import same
from support.tiny import pieces


def fit(root: Path, ckpt_path: str | None = None) -> tuple[dict[str, Any], ModelCheckpoint]:
    _, module, data = pieces("method=moco", "method.queue_size=20", "regularizer.every=2", "negatives=patch")
    keep = ModelCheckpoint(root / "kept", "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = pl.Trainer(max_epochs=2, default_root_dir=root, callbacks=[keep, LearningRateMonitor()])
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return {"module": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}, keep


def test_it_trains_saves_and_continues_to_the_last_bit(tmp_path: Path) -> None:
    whole, keep = fit(tmp_path)
    assert Path(keep.best_model_path).name == "step=15.ckpt"
    for step in (5, 10):  # in the first and in the second epoch of eight steps
        continued, _ = fit(tmp_path / str(step), f"{keep.dirpath}/step={step}.ckpt")
        same(whole, continued)
