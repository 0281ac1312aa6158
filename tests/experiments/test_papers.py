"""Every row of both papers' tables is a run that composes, trains, and has the published settings."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.tiny import trained

from experiments import papers
from experiments.papers import Row, read_rows, shortened
from icl_msr.core.config import Settings, check

ROWS = {row.name: row for row in read_rows()}
QUICK = ["icl_msr/small/wmse/stl10", "icl_msr/small/simclr_msr/cifar10"]
"""The others are slow tests."""

MSR_SMALL = {"simclr_msr": 1.0, "byol_msr": 0.1, "lmcl_msr": 0.1, "ressl_msr": 0.01}
MSR_100 = {"simclr_msr": (0.1, 1.0), "cmc_msr": (0.1, 0.1), "debiased_msr": (1.0, 1.0), "lmcl_msr": (1.0, 1.0)}
"""Lambda, and lambda with gamma, as printed. The paper gives none for SwAV."""


def settings(name: str, *words: str) -> Settings:
    """The settings of a row; no data has to be there."""
    found = papers.composed([*ROWS[name].words, *words])
    for node, key in ((found.dataset, "root"), (found.negatives, "folder")):
        if OmegaConf.is_missing(node, key):
            node[key] = "nowhere"
    return check(found)


@cache
def config(name: str) -> dict[str, Any]:
    return settings(name).model_dump()


def test_the_tables_are_whole() -> None:
    assert len(ROWS) == 100
    numbers = [value for row in ROWS.values() for value in row.published.values()]
    assert len(numbers) == 207
    assert [name for name, row in ROWS.items() if None in row.published.values()] == [
        "icl_msr/imagenet/swav",
        "icl_msr/imagenet/swav_msr",
        "negatives/imagenet100/moco_512",
    ]
    assert all(value is None or 10 < value < 100 for value in numbers)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_a_row_trains_two_batches(name: str) -> None:
    """With its own method, regularizer, negatives, optimiser and backbone, on 16 small images at a time."""
    small = ["loader.batch_size=16", "loader.num_workers=0", "backbone.stem=standard"]
    if "/wmse" in name:
        small += ["method.embedding_dim=4", "method.whitening_size=8"]
    if "texture" in name:
        small += ["negatives=texture"]  # the folder of textures is not there
    module, trainer = trained(settings=settings(name, *small))
    assert trainer.global_step == 2
    assert 0 < float(trainer.callback_metrics["loss"]) < 1e4
    assert (module.regularizer is not None) == ("lam" in config(name)["regularizer"])


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "width"),
    [
        ("icl_msr/small/simclr/cifar10", 3e-3, 1000, 64),
        ("icl_msr/small/byol_msr/cifar100", 3e-3, 1000, 64),
        ("icl_msr/small/ressl/stl10", 2e-3, 2000, 128),
        ("icl_msr/small/lmcl_msr/tiny_imagenet", 2e-3, 1000, 128),
        ("icl_msr/imagenet100/cmc", 2e-3, 1000, 128),
    ],
)
def test_published_settings_of_icl_msr(name: str, rate: float, epochs: int, width: int) -> None:
    found = config(name)
    assert found["optimizer"] == {"_target_": "torch.optim.Adam", "lr": rate, "weight_decay": 1e-6}
    assert found["schedule"]["warmup_steps"] == 500
    assert (found["schedule"]["drop_at"], found["schedule"]["drop_factor"]) == ([50, 25], 0.2)
    assert found["trainer"]["max_epochs"] == epochs
    assert found["method"]["embedding_dim"] == width
    assert found["loader"]["batch_size"] == 512
    if "small" in name:
        assert found["backbone"]["name"] == "resnet18"
        assert found["augment"]["interpolation"] == "bicubic"


def test_lambda_and_gamma_are_as_printed() -> None:
    for method, lam in MSR_SMALL.items():
        found = config(f"icl_msr/small/{method}/cifar10")["regularizer"]
        assert (found["lam"], found["gamma"], found["n"], found["u"]) == (lam, 1.0, 6, 2.0)
        letter = {"reduction": "sum", "alpha": "lr", "schedule": "per_epoch", "uniformity_trains": "all"}
        assert found == found | letter
    for method, (lam, gamma) in MSR_100.items():
        found = config(f"icl_msr/imagenet100/{method}")["regularizer"]
        assert (found["lam"], found["gamma"], found["image_size"]) == (lam, gamma, 64)
    assert config("icl_msr/semi_supervised/simclr_msr")["regularizer"]["n"] == 14


@pytest.mark.parametrize(
    ("row", "queue", "alpha", "rate", "batch", "momentum"),
    [
        ("moco", 16384, None, 0.03, 128, 0.999),
        ("texture", 16384, 2.0, 0.03, 128, 0.999),
        ("patch_alpha3", 16384, 3.0, 0.03, 128, 0.999),
        ("patch_k8192", 8192, 2.0, 0.03, 128, 0.999),
        ("moco_512", 65536, None, 0.8, 512, 0.99),
        ("patch_512_k16384", 16384, 2.0, 0.8, 512, 0.99),
    ],
)
def test_published_settings_of_ge(
    row: str, queue: int, alpha: float | None, rate: float, batch: int, momentum: float
) -> None:
    found = config(f"negatives/imagenet100/{row}")
    method = {"queue_size": queue, "momentum": momentum, "temperature": 0.2, "embedding_dim": 128}
    assert found["method"] == found["method"] | method
    assert found["negatives"].get("alpha") == alpha
    assert found["optimizer"]["lr"] == rate
    assert found["schedule"]["scale_lr"] == "none"
    assert found["loader"]["batch_size"] == batch
    assert found["trainer"]["max_epochs"] == 200
    assert found["optimizer"]["weight_decay"] == 1e-4
    probes = [node for node in found["evaluation"].values() if node["probe"] == "moco"]
    assert [(p["learning_rates"], p["probe_epochs"], p["probe_batch_size"]) for p in probes] == [([10.0], 60, 128)] * 2


def test_a_short_run_keeps_the_shape_of_its_schedule() -> None:
    words = shortened(ROWS["icl_msr/small/simclr/cifar10"], 0.02)
    more = ["trainer.max_epochs=20", "schedule.warmup_steps=10", "schedule.drop_at=[1,0]"]
    assert words[-3:] == more
    assert shortened(ROWS["icl_msr/small/simclr/cifar10"], 1) == list(ROWS["icl_msr/small/simclr/cifar10"].words)


def test_the_table_compares_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(papers, "RUNS", tmp_path)
    row: Row = ROWS["icl_msr/small/simclr/cifar10"]
    for seed, value in ((0, 0.91), (1, 0.92)):
        place = papers.folder(row, 0.5, seed)
        place.mkdir(parents=True)
        record = {"encoder": "trained", "family": "linear", "preset": "wmse", "fitted_on": "train", "split": "test"}
        content = {"seed": seed, "records": {"accuracy": [{**record, "value": value}]}}
        (place / "results.json").write_text(json.dumps(content))
    (cells,) = zip(*(column.cells for column in papers.compared([row]).columns), strict=True)
    assert cells == (row.name, "linear", "91.80", "91.50 ± 0.71", "-0.30", "2", "0.5")


def test_an_unknown_run_is_said() -> None:
    with pytest.raises(SystemExit, match="No run begins with icl_msr/smal/"):
        read_rows("icl_msr/smal/")
