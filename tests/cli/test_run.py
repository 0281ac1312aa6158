"""One whole run and one sweep: what they leave, and that it can be used."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from support.inprocess import TRAINER, WORDS, Finished, execute, finish
from support.tiny import DATA, composed, pieces
from support.written import accuracy, outcome
from torch import nn

from icl_msr.cli.assemble import assemble, derive, make_optimization
from icl_msr.core.config import build_as, check, fingerprint
from icl_msr.core.errors import UserError
from icl_msr.core.records import Outcome, chosen_metric
from icl_msr.evaluation.suite import Results
from icl_msr.models.backbones import Backbone, tiny, tiny_network
from icl_msr.report import summarise
from icl_msr.training.hardware import Hardware


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(tmp_path_factory.mktemp("many"), "-m", "seed=0,1")


def test_the_folder_is_complete(finished: Finished) -> None:
    found = {str(file.relative_to(finished.folder)) for file in finished.folder.rglob("*.*")}
    figures = ("views", "negatives", "strata", "weights", "neighbours", "map")
    assert {name for name in found if not name.endswith(".log")} == {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "results.json",
        "predictions.npz",
        "report.html",
        "encoder.json",
        "encoder.safetensors",
        "checkpoints/last.ckpt",
        "figures/captions.json",
        *(f"figures/{name}.png" for name in figures),
    }


def test_the_config_composes_back(finished: Finished) -> None:
    saved = OmegaConf.load(finished.folder / "config.yaml")
    assert isinstance(saved, DictConfig)
    again = fingerprint(check(saved))
    assert again == finished.json("environment.json")["config_hash"]
    assert again == fingerprint(check(composed(*WORDS, *TRAINER)))


def test_the_environment_says_how_to_repeat_it(finished: Finished) -> None:
    about = finished.json("environment.json")
    assert about["command"].startswith("python -m icl_msr.run dataset.train=64")
    assert about["torch"] == torch.__version__
    assert about["hardware"].startswith("1 x ")


def test_metrics_are_logged(finished: Finished) -> None:
    lines = [line.split(",") for line in (finished.folder / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    for name in ("loss", "loss/contrastive", "loss/msr", "embedding_std", "lr", "msr/meta_grad_norm", "online/knn"):
        assert any(row[name] for row in rows), name
    steps = [int(row["step"]) for row in rows if row["loss"]]
    assert steps == list(range(6))


def test_results_are_consistent(finished: Finished) -> None:
    results, predictions = finished.json("results.json"), np.load(finished.folder / "predictions.npz")
    assert results["choices"]["method"] == "moco"
    assert results["choices"]["negatives"] == "patch"
    assert results["derived"]["total_steps"] == 6
    assert results["derived"]["steps_per_epoch"] == 3
    assert results["parameters"] == sum(p.numel() for p in tiny(32, weights=None).parameters())
    accuracies = Outcome.load(finished.folder).records.where("accuracy")
    assert {a.encoder for a in accuracies} == {"trained", "untrained"}
    for a in accuracies:
        name = f"{a.encoder}/{a.classifier}/{a.fitted_on}/{a.split}"
        assert a.value == pytest.approx((predictions[name] == predictions[f"labels/{a.split}"]).mean())


def test_the_returned_value_is_the_metric(finished: Finished) -> None:
    known = {"encoder": "trained", "classifier": "knn-dino", "fitted_on": "balanced", "split": "mixed_rand"}
    (expected,) = Outcome.load(finished.folder).records.where("accuracy", **known)
    assert finished.values == [expected.value]


def test_the_checkpoint_is_plain_and_whole(finished: Finished) -> None:
    checkpoint = torch.load(finished.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    module = pieces(*WORDS, "seed=5")[1]
    module.load_state_dict(checkpoint["state_dict"])
    assert module.regularizer is not None
    assert module.regularizer.optimizer is not None
    moments = module.regularizer.optimizer.state_dict()["state"]
    assert all(float(moment["step"]) == 2 for moment in moments.values())  # at the first and the fifth of 6 steps


@torch.no_grad()
def test_the_exported_encoder_needs_nothing_of_this_package(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = finished.json("encoder.json")
    assert "icl_msr" not in about["load"]
    assert about["dataset"] == "confounded"
    assert len(about["mean"]) == len(about["std"]) == 3
    monkeypatch.chdir(finished.folder)
    scope: dict[str, Any] = {}
    exec(about["load"], scope)
    net = scope["net"]
    assert all(type(layer).__module__.startswith(("torch.", "torchvision.")) for layer in net.modules())

    module = pieces(*WORDS)[1]
    module.load_state_dict(torch.load("checkpoints/last.ckpt", weights_only=True)["state_dict"])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(images), module.method.backbone.eval()(images))
    assert torch.equal(net(images), tiny(32, weights=str(finished.folder)).eval()(images))


def test_the_report_stands_alone(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    assert page.count("data:image/") >= 4
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    captions = finished.json("figures/captions.json")
    assert list(captions) == ["views.png", "negatives.png", "strata.png", "weights.png", "neighbours.png", "map.png"]


def test_the_terminal_says_what_and_where(finished: Finished) -> None:
    first, *_, second_last, last = finished.printed.splitlines()
    assert first.startswith("moco-msr-patch-confounded-tiny on 1 x ")
    assert second_last == f"results  {finished.folder / 'results.json'}"
    assert last == f"report   {finished.folder / 'report.html'}"
    assert re.search(r"^epoch 2/2   loss \d+\.\d+   knn .* %", finished.printed, re.MULTILINE)
    assert "mixed_rand" in finished.printed


def test_a_sweep_is_as_many_runs(sweep: Finished, finished: Finished) -> None:
    assert len(sweep.values) == 2
    first, second = (load_file(sweep.folder / job / "encoder.safetensors") for job in "01")
    alone = load_file(finished.folder / "encoder.safetensors")
    # The same seed gives the same weights, to the last bit, whatever ran before in this process.
    assert all(torch.equal(value, alone[name]) for name, value in first.items())
    assert not any(torch.equal(value, alone[name]) for name, value in second.items() if name.endswith("weight"))


def test_a_sweep_makes_one_table(sweep: Finished) -> None:
    summary = summarise([sweep.folder])
    assert not summary.failed
    (configuration,) = summary.configurations
    assert [run.outcome.seed for run in configuration.runs] == [0, 1]
    assert all(statistic.n == 2 for statistic in configuration.metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "timm:test_vit"])
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_other_backbones_run(backbone: str, method: str, tmp_path: Path) -> None:
    done = finish(tmp_path, f"method={method}", "seed=1", f"backbone={backbone}")
    assert done.values[0] >= 0


@pytest.mark.parametrize("backbone", ["timm:mobilenetv3_small_050", f"{__name__}.flat"])
def test_a_backbone_without_maps_is_trained_and_the_rest_is_drawn(backbone: str, tmp_path: Path) -> None:
    chosen = f"backbone={backbone}" if ":" in backbone else f"backbone._target_={backbone}"
    done = finish(tmp_path, chosen, "regularizer=msr", "trainer.max_epochs=1")
    assert re.search(r"The strata are not drawn: \S+ has no last feature map of \d+ channels", done.printed)
    assert "could not be made" not in done.printed
    drawn = {file.name for file in (done.folder / "figures").glob("*.png")}
    assert {"views.png", "weights.png", "neighbours.png"} <= drawn
    assert "strata.png" not in drawn
    assert "strata" not in done.json("results.json")["records"]


def flat(image_size: int, *, weights: None) -> Backbone:
    """A backbone of a user's package, without feature maps."""
    return Backbone(nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 8)), 8, "net = None")


def wrong_width(image_size: int, *, weights: None) -> Backbone:
    return Backbone(tiny_network(), 64, "net = None")


def unpooled(image_size: int, *, weights: None) -> Backbone:
    return Backbone(nn.Conv2d(3, 8, 3), 8, "net = None")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([f"backbone._target_={__name__}.wrong_width"], "features of 128 channels, and its `channels` says 64"),
        ([f"backbone._target_={__name__}.unpooled"], "shape (2, 8, 30, 30) for two images, and pooled features"),
        ([f"backbone._target_={__name__}.flat", "augment.size=16"], "Sequential cannot take images of 16 pixels"),
        (["backbone._target_=torch.nn.Identity"], "is not of the kind Backbone, which is needed here"),
        (["backbone=timm:vit_tiny_patch16_224", "augment.size=48"], "change the size in augment.size or augment.views"),
        (["backbone=timm:levit_128s"], "levit_128s cannot take images of 32 pixels"),
        (["augment.size=1", "negatives=patch"], "cannot make negatives of views of 1 pixels"),
        (["augment.size=1", "negatives=texture"], "cannot make negatives of views of 1 pixels"),
    ],
)
def test_a_backbone_is_tried_before_anything_is_written(words: list[str], sentence: str, tmp_path: Path) -> None:
    answer = execute(*WORDS, *words, f"hydra.run.dir={tmp_path}/run")
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert sentence in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_without_evaluation_or_regularizer(tmp_path: Path) -> None:
    done = finish(tmp_path, "regularizer=none", "evaluation=none", "~callbacks.online")
    assert np.isnan(done.values[0])
    assert done.json("results.json")["records"] == {}
    assert (done.folder / "report.html").exists()


def settings(*words: str) -> Any:
    return check(composed(*DATA, *words))


def test_derived_numbers() -> None:
    words = ("loader.batch_size=10", "trainer.accumulate_grad_batches=4", "trainer.max_epochs=3", "optimizer=sgd")
    words += ("schedule.scale_lr=linear",)
    chosen = settings(*words)
    optimization = make_optimization(chosen)
    numbers = {
        "training_images": 128,
        "global_batch": 40,
        "steps_per_epoch": 3,  # 12 batches
        "total_steps": 9,
        "effective_learning_rate": pytest.approx(0.03 * 40 / 256),
    }
    assert derive(chosen, optimization, 128, 1) == derive(chosen, optimization, 128, 5) == numbers
    limited = settings(*words, "trainer.limit_train_batches=5")
    assert derive(limited, optimization, 128, 1)["steps_per_epoch"] == 2
    with pytest.raises(UserError, match=r"loader\.batch_size=10 .* set it to 9 or less"):
        derive(chosen, optimization, 9, 1)
    with pytest.raises(UserError, match=r"loader\.batch_size=10 cannot be shared by 4 devices; set it to 8\."):
        derive(chosen, optimization, 128, 4)


def test_a_group_must_give_what_it_is_for() -> None:
    with pytest.raises(UserError, match=r"icl_msr\.training\.hardware\.Hardware is not of the kind Results"):
        build_as(Results, settings().hardware)


def test_the_metric_of_a_sweep() -> None:
    final = {"online/knn": 0.1, "loss": 3.0}
    results = outcome(
        accuracy("mixed_rand", 0.2, "knn-dino", "balanced"),
        accuracy("mixed_rand", 0.3),
        accuracy("original", 0.4, fitted_on="balanced"),
        accuracy("mixed_rand", 0.5, fitted_on="balanced"),
        accuracy("mixed_rand", 0.6, fitted_on="balanced", encoder="untrained"),
        final=final,
    )
    assert chosen_metric("auto", results) == ("linear/balanced/mixed_rand", 0.5)
    assert chosen_metric("linear/train/mixed_rand", results) == ("linear/train/mixed_rand", 0.3)
    assert chosen_metric("loss", results) == ("loss", 3.0)
    assert chosen_metric("auto", outcome(final=final)) == ("online/knn", 0.1)
    # Not yet logged in a run that was too short for it.
    name, value = chosen_metric("online/probe", results)
    assert name == "online/probe"
    assert np.isnan(value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["metric=online/kn"], r"^metric=online/kn will not be measured; did you mean online/knn"),
        (["evaluation=none", "metric=linear/balanced/mixed_rand"], r"will not be measured; choose one of auto, loss, "),
    ],
)
def test_a_metric_that_will_not_be_measured_is_refused(words: list[str], sentence: str) -> None:
    chosen = settings("loader.batch_size=8", *words)
    with pytest.raises(UserError, match=sentence):
        assemble(chosen, build_as(Hardware, chosen.hardware).plan())


def test_a_run_may_end_with_a_comparison_of_encoders_alone(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strata are looked at by a bootstrap, which this evaluation has not."""
    monkeypatch.setattr("support.inprocess.WORDS", [word for word in WORDS if word != "evaluation=light"])
    found = finish(tmp_path, "evaluation=similarity", f"evaluation.other={finished.folder}")
    results = json.loads((found.folder / "results.json").read_text())
    assert {row["encoder"] for row in results["records"]["similarity"]} == {"trained", "untrained"}


def test_two_evaluations_of_one_run(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their results stand beside each other, and a key goes to the one that has it."""
    monkeypatch.setattr("support.inprocess.WORDS", [word for word in WORDS if word != "evaluation=light"])
    own = ("evaluation=[light,similarity]", f"evaluation.other={finished.folder}", "evaluation.untrained=false")
    found = finish(tmp_path, "regularizer=none", "trainer.max_epochs=1", *own)
    assert found.json("results.json")["choices"]["evaluation"] == "light+similarity"
    records = Outcome.load(found.folder).records
    assert {record.encoder for record in records.where("similarity")} == {"trained"}
    assert {record.encoder for record in records.where("accuracy")} == {"trained"}
    assert {str(record.classifier) for record in records.where("accuracy")} == {"knn-dino"}
