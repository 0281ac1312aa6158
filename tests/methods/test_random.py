"""What is special to the lower reference: whatever the optimiser, the encoder stays; its running statistics follow."""

import pytest
import pytorch_lightning as pl
import torch
from support.tiny import pieces

from icl_msr.methods import RandomEncoder
from icl_msr.models.backbones import tiny
from icl_msr.training.module import Pretraining


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "lars"])
def test_training_moves_statistics_alone(optimizer: str) -> None:
    words = (f"optimizer={optimizer}", "optimizer.weight_decay=0.5", "++bias_and_norm.weight_decay=0.5")
    _, other, loader = pieces("method=simclr", "regularizer=none", *words)
    method = RandomEncoder(tiny(32, weights=None))
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["nothing"]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    module = Pretraining(method, None, other.optimization, seed=0, batch_size=8)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["loss"] == 0
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]) != ("running_" in name or "num_batches" in name), name
