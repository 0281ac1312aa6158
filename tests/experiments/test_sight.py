"""The oracle strata and the power of the study that can see."""

from typing import Any

import pytest
import torch
from support.tiny import trained
from torch import Tensor, nn

from experiments.sight import power
from experiments.sight.oracle import OracleStrata
from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.models.backbones import Backbone

KEYS: dict[str, Any] = {"share": 0.5, "every": 2, "images": 16, "lam": 1.0, "seed": 0}


class Eyes(nn.Module):
    """Eight channels: two dead ones, three that see the object in the middle, and three that see the corner."""

    def forward(self, images: Tensor) -> Tensor:
        middle, corner = images[:, :, 6:10, 6:10].mean((2, 3)), images[:, :, :3, :3].mean((2, 3))
        return torch.cat([torch.zeros(len(images), 2), middle, corner], 1)


def centred(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(count, 16, 16, dtype=torch.bool)
    masks[:, 6:10, 6:10] = True
    return Dataset("x", ["a"], 16, ArraySplit(images, torch.zeros(count, dtype=torch.int64), masks), {})


def test_the_oracle_keeps_the_channels_that_a_swap_does_not_move() -> None:
    oracle = OracleStrata(8, 0.2, centred(), **KEYS | {"share": 0.375})
    moved = oracle.moved(Backbone(Eyes(), 8))
    assert moved[:2].isinf().all()
    assert moved[2:5].abs().max() < 1e-6
    assert moved[5:].min() > 0.5


def test_the_oracle_trains_a_method_and_reads_its_stratum_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def read(self: OracleStrata, batch: Any, true: Any = OracleStrata.before_step) -> dict[str, Tensor]:
        log: dict[str, Tensor] = true(self, batch)
        found.append((log, self.msr.get_buffer("fixed").clone()))
        return log

    monkeypatch.setattr(OracleStrata, "before_step", read)
    keys = ", ".join(f"{key}: {value}" for key, value in KEYS.items())
    node = f"+regularizer={{_target_: experiments.sight.oracle.OracleStrata, {keys}}}"
    trained("method=simclr", "~regularizer", node, limit_train_batches=3)
    logs, strata = zip(*found, strict=True)
    assert [bool(log) for log in logs] == [True, False, True]
    assert 0 < logs[0]["oracle/moved_kept"] < logs[0]["oracle/moved"]
    assert int((strata[0] > 0).sum()) == 64
    assert torch.equal(strata[0], strata[1])
    assert not torch.equal(strata[1], strata[2])
    assert strata[2].norm() == pytest.approx(1)


def test_the_oracle_needs_masks() -> None:
    blind = ArraySplit(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="The oracle needs masks"):
        OracleStrata(8, 0.2, Dataset("x", ["a"], 16, blind, {}), **KEYS)


def test_the_power_is_that_of_the_noncentral_t() -> None:
    assert power.simulated(effect=0.0, spread=1.0, seeds=5, studies=20000) == pytest.approx(0.05, abs=0.006)
    for seeds in (3, 5):
        assert power.simulated(power.needed(1.0, seeds), 1.0, seeds, 20000) == pytest.approx(0.8, abs=0.01)
