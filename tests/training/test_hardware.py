"""What a run takes of the machine it is on."""

from typing import Any

import pytest
import torch

from icl_msr.core.errors import UserError
from icl_msr.training.hardware import Hardware

KEYS: dict[str, Any] = {"accelerator": "auto", "devices": 1, "nodes": 1, "precision": "auto", "channels_last": True}


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
