"""The examples run, and train what they say."""

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from icl_msr.core.errors import UserError
from icl_msr.regularizers import MetaSemanticRegularizer


@pytest.mark.parametrize("name", ["msr_plain", "msr_lightly"])
def test_msr_in_a_loop_of_ones_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = importlib.import_module(f"experiments.examples.{name}").main()
    assert len(rows) == 3
    for row in rows:
        assert all(map(math.isfinite, row.values()))
        assert row["meta_grad_norm"] > 0
        assert row["uniformity_grad_norm"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["uniformity"] < rows[0]["uniformity"]
    assert capsys.readouterr().out.count("meta_grad_norm") == 3


def test_negatives_in_a_loop_of_ones_own(capfd: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("experiments.examples.negatives").main()
    out, err = capfd.readouterr()
    assert err == ""
    losses = {line.split()[0]: float(line.split()[-1]) for line in out.splitlines()}
    assert losses.keys() == {"patch", "texture", "phase"}
    assert len(set(losses.values())) == 3


def test_the_regularizer_needs_no_lightning() -> None:
    """And neither Hydra nor W&B."""
    code = "import sys, icl_msr.regularizers; print({'pytorch_lightning', 'hydra', 'wandb'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


def test_defaults_are_those_of_the_config_and_keys_are_checked() -> None:
    regularizer = MetaSemanticRegularizer.with_defaults(16, None, seed=0, lam=0.25)
    assert (regularizer.lam, regularizer.gamma, regularizer.temperature) == (0.25, 1.0, 0.5)
    with pytest.raises(UserError, match=r"regularizer\.lambda is not a key .* did you mean lam"):
        MetaSemanticRegularizer.with_defaults(16, None, seed=0, **{"lambda": 1.0})
    with pytest.raises(UserError, match=r"regularizer\.weights=\"metta\" is not allowed"):
        MetaSemanticRegularizer.with_defaults(16, None, seed=0, weights="metta")


class Broken(pl.Callback):
    """Ends the training in the middle of an epoch, between two checkpoints."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("broken")


def test_a_trainer_of_ones_own_resumes(tmp_path: Path) -> None:
    """From Lightning's own checkpoint, to the same weights, queue, strata and moments."""
    main = importlib.import_module("experiments.examples.plain_trainer").main
    whole = main(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broken"):
        main(tmp_path / "broken", [Broken()])
    assert torch.load(tmp_path / "broken" / "last.ckpt", weights_only=True)["global_step"] == 3
    resumed = main(tmp_path / "broken")
    assert resumed.trainer.global_step == whole.trainer.global_step == 16
    expected, found = whole.state_dict(), resumed.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
    checkpoint = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"seed": 0, "batch_size": 16, "config": None}
