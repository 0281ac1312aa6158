"""What a run takes of the machine it is on."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.inprocess import execute
from support.tiny import DATA, MODEL
from support.toys import make_method

from icl_msr.core.errors import UserError
from icl_msr.regularizers.bilevel import meta_pass
from icl_msr.training.hardware import Hardware

KEYS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "nodes": 1,
    "precision": "auto",
    "channels_last": True,
    "compile": False,
    "requeue": False,
    "tf32": False,
}


def hardware(**changes: Any) -> Hardware:
    return Hardware(**{**KEYS, **changes})


def test_this_machine() -> None:
    plan = hardware().plan()
    assert plan.accelerator == ("gpu" if torch.cuda.is_available() else "cpu")
    assert plan.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert plan.precision in ("bf16-mixed", "32-true")
    assert plan.channels_last
    assert str(plan).startswith("1 x ")
    assert f"{plan.precision} (auto: " in str(plan)


def test_what_is_asked_for_is_taken() -> None:
    plan = hardware(accelerator="cpu", precision="32-true", channels_last=False).plan()
    assert (plan.accelerator, plan.precision, plan.channels_last) == ("cpu", "32-true", False)
    assert hardware(accelerator="cpu", precision="bf16-mixed").plan().precision == "bf16-mixed"


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_where_it_is_fast(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    plan = hardware(accelerator="cpu").plan()
    assert plan.precision == ("bf16-mixed" if fast else "32-true")
    assert f"auto: {'fast' if fast else 'no fast'} bf16 here" in str(plan)


def test_a_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="1 GPU but there are 0; type hardware=cpu"):
        hardware(accelerator="gpu").plan()
    assert hardware().plan().accelerator == "cpu"


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 GPU but there are 2"):
        hardware(accelerator="gpu", devices=4).plan()


def test_the_processes_that_train_together() -> None:
    plan = hardware(accelerator="cpu", devices=2, nodes=3, precision="32-true").plan()
    assert plan.world_size == 6
    assert str(plan).startswith("6 x CPU")
    assert "32-true, channels_last" in str(plan)


def test_tf32_is_as_asked_for_and_off_in_the_meta_pass() -> None:
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for asked in (True, False):
            hardware(tf32=asked).plan()
            assert [switch.allow_tf32 for switch in switches] == [asked, asked]
            with meta_pass(make_method("simclr"), torch.device("cpu")):
                assert not any(switch.allow_tf32 for switch in switches)
            assert [switch.allow_tf32 for switch in switches] == [asked, asked]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@pytest.mark.slow
def test_compiled_backbones_learn_the_same_under_the_same_names(tmp_path: Path) -> None:
    short = [
        *DATA,
        *MODEL,
        "regularizer=msr",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=4",
        "evaluation=light",
    ]
    short += ["trainer.log_every_n_steps=1", "logger=csv", "hardware.precision=32-true", "regularizer.every=2"]
    losses, names = [], []
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        done = execute(*short, f"hardware.compile={compiled}", f"hydra.run.dir={folder}")
        assert done.code == 0, done.err
        with (folder / "metrics.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])
        names.append(sorted(load_file(folder / "encoder.safetensors")))
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert names[0] == names[1]
