"""`python -m icl_msr.evaluate`: any encoder, on any data set, by the numbers that a run would give."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from support.tiny import DATA, MODEL, composed, trained
from support.tiny import dataset as tiny_dataset

from icl_msr import __version__
from icl_msr.cli.order import find
from icl_msr.core.config import build, check
from icl_msr.core.folder import RunFolder
from icl_msr.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from icl_msr.core.records import Measurement, Outcome
from icl_msr.evaluate import main
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.sixteen import SIXTEEN
from icl_msr.models.exported import export_encoder, load_encoder
from icl_msr.models.foreign import foreign_encoder, untrained_copy
from icl_msr.report.__main__ import main as report
from icl_msr.training.checkpoint import AtomicCheckpoint
from icl_msr.training.checkpoints import Checkpoints

FAST = ["hardware=cpu", "evaluation=light", "evaluation.untrained=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that was never finished; `seed` 3, so that it is not the seed of anything else."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for name in ("run", "exported"):
        (folder.parent / name).mkdir()
    words = ("regularizer=none", "method=moco", "seed=3")
    keep = Checkpoints(folder / "checkpoints" / "last.ckpt", every_n_epochs=1, every_n_minutes=None)
    module, _ = trained(*words, callbacks=[keep], plugins=[AtomicCheckpoint()])
    OmegaConf.save(composed(*DATA, *MODEL, *words), folder / "config.yaml")
    data = tiny_dataset()
    images = {"image_size": data.image_size, "mean": data.mean, "std": data.std, "dataset": data.name}
    choices = {"method": "moco", "regularizer": "none", "dataset": "confounded", "evaluation": "default"}
    about = {"name": "moco-none", "images": images, "choices": choices, "icl_msr": __version__}
    RunFolder(folder).write_facts(about)
    export_encoder(module.method.backbone, folder.parent / "exported", {**images, "choices": choices})
    return folder.parent


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and default folders are relative to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes, 12 in train and 4 in test each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for k, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 50, 3)) + 120 * k
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def results(folder: str | Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text())
    return content


def records(folder: str | Path, kind: str, **known: Any) -> list[Measurement]:
    return Outcome.load(Path(folder)).records.where(kind, **known)


def test_a_run_of_an_older_version_lacks_keys_of_its_data_set(runs: Path, tmp_path: Path) -> None:
    """Its config is completed with today's values, which are those that it had without saying so."""
    old = tmp_path / "old"
    shutil.copytree(runs / "run", old)
    config = OmegaConf.load(old / "config.yaml")
    del config.dataset["rho"]
    OmegaConf.save(config, old / "config.yaml")
    assert main([f"run={old}", *FAST, "to=a"]) == 0
    assert main([f"run={runs}/run", *FAST, "to=b"]) == 0
    assert records("a", "accuracy") == records("b", "accuracy")


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(photos: Path) -> None:
    words = ["encoder=torchvision:resnet18", "weights=null", "dataset=imagefolder", f"dataset.root={photos}"]
    words += ["hardware=cpu", "evaluation=default", "evaluation.bootstrap=20", "evaluation.batch_size=4", "cache=null"]
    for name, devices in (("one", 1), ("two", 2)):
        command = [sys.executable, "-m", "icl_msr.evaluate", *words, f"hardware.devices={devices}", f"to={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Accuracy, %") == 1
    one, two = results("one"), results("two")
    assert {**one, "wall_time_s": 0} == {**two, "wall_time_s": 0}
    with np.load("one/predictions.npz") as alone, np.load("two/predictions.npz") as shared:
        assert all(np.array_equal(alone[key], shared[key]) for key in alone)
    command = [sys.executable, "-m", "icl_msr.evaluate", *words, "hardware.devices=2", "to=two"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "two holds results or a run already; choose another folder, to=FOLDER.\n"


def test_a_run_gives_the_numbers_of_its_own_evaluation(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its folder, by its checkpoint and by its exported encoder; the data set is its own unless it has none."""
    words = [*FAST, "evaluation.untrained=true"]
    assert main([f"run={runs}/run", *words, "to=a"]) == 0
    out = capsys.readouterr().out
    assert "Accuracy, %" in out
    assert "Gaps, points" in out
    assert "Representation" in out
    assert "a/results.json" in out
    assert main([f"checkpoint={runs}/run/checkpoints/last.ckpt", *words, "to=b"]) == 0
    exported = f"encoder={runs}/exported/encoder.safetensors"
    assert main([exported, *DATA, "seed=3", *words, "to=c"]) == 0
    found = [results(folder) for folder in "abc"]
    for part in ("records", "by_class", "layouts"):
        assert found[0][part] == found[1][part] == found[2][part]
    assert {"accuracy", "gap", "health"} <= found[0]["records"].keys()
    assert found[0]["seed"] == found[0]["evaluation_seed"] == 3
    assert {record.encoder for record in records("a", "accuracy")} == {"trained", "untrained"}

    backbone, _ = load_encoder(runs / "exported")
    evaluation = build(check(composed("evaluation=light")).evaluation["light"])
    own = evaluation(backbone, tiny_dataset(), device="cpu", seed=3).records
    assert records("a", "accuracy", encoder="trained") == own.where("accuracy")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_vit", "torchvision:mobilenet_v3_small"])
def test_foreign_encoders_with_random_weights(name: str, photos: Path) -> None:
    words = [f"encoder={name}", "weights=null", "dataset=imagefolder", f"dataset.root={photos}", *FAST]
    words.append("dataset.image_size=32")
    assert main([*words, "to=one"]) == 0
    assert main([*words, "to=again", "cache=null"]) == 0
    assert main([*words, "to=other", "seed=1"]) == 0
    one, again = results("one"), results("again")
    assert one["records"] == again["records"]
    assert one["by_class"] == again["by_class"]
    assert one["classes"] == ["cat", "dog"]
    identities = [
        json.loads(Path(to, "environment.json").read_text())["encoder"]["identity"] for to in ("one", "other")
    ]
    assert identities[0] != identities[1]
    assert one["choices"]["dataset"] == f"imagefolder {photos.name}"
    assert one["choices"]["encoder"] == name


def test_the_classifier_of_a_whole_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shape bias by a file's own classifier, against torchvision and a loop; features as without the classifier."""
    rng = np.random.default_rng(1)
    names, pictures = ["bear", "cat", "clock", "dog"], {}
    for shape, texture in itertools.product(names, names):
        for i in (1, 2):
            pixels = rng.integers(0, 255, (8, 8, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            Path("stimuli", shape).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(Path("stimuli", shape, f"{shape}{i}-{texture}{i}.png"))
            pictures[shape, texture, i] = pixels
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    images = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 255 for p in pictures.values()])
    with torch.inference_mode():
        scores = net((images - mean) / std)
        # Spread over the four classes, and a few others that are also among the 16 or among none.
        decided = [numbers[-1] for name, numbers in SIXTEEN.items() if name in names] + [404, 0]
        net.fc.weight *= 400
        net.fc.bias.copy_(-400 * (scores - net.fc.bias).mean(0))
        net.fc.bias[decided] += 10
        expected = net((images - mean) / std).double().softmax(1)
    save_file(net.state_dict(), "whole.safetensors")
    save_file({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}, "encoder.safetensors")
    shape = texture = n = 0
    for (of_shape, of_texture, _), probabilities in zip(pictures, expected, strict=True):
        if of_shape != of_texture:
            means = {name: sum(probabilities[k].item() for k in at) / len(at) for name, at in SIXTEEN.items()}
            taken = max(means, key=lambda name: means[name])
            n, shape, texture = n + 1, shape + (taken == of_shape), texture + (taken == of_texture)
    words = ["dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", "hardware=cpu"]
    words += ["evaluation=[light,shape]", "evaluation.stimuli=stimuli", "evaluation.probe_epochs=1"]
    words += ["evaluation.untrained=false", "evaluation.linear=true", "evaluation.bootstrap=20"]
    words.append("encoder=torchvision:resnet18")
    assert main([*words, "weights=whole.safetensors", "evaluation.head=true", "to=runs/whole"]) == 0
    assert "Fitted on data of its own" in Path("runs/whole/report.html").read_text()
    probe, head = (
        {record.metric: record for record in records("runs/whole", "shape", classifier=name)}
        for name in ("linear", "head")
    )
    assert (probe["classes"].n, probe["classes"].value) == (4, 2)
    assert (head["classes"].fitted_on, head["classes"].n, head["classes"].value) == ("own", n, 16)
    assert n == 24
    assert shape > 0
    assert texture > 0
    assert head["decided"].value == shape + texture < n
    assert head["shape_bias"].value == pytest.approx(shape / (shape + texture))
    assert head["shape"].value == pytest.approx(shape / n)
    assert report(["runs"]) == 0
    assert "head" in capsys.readouterr().out
    assert main([*words, "weights=encoder.safetensors", "to=runs/encoder"]) == 0
    whole = [record for record in records("runs/whole", "accuracy") if record.fitted_on != "own"]
    assert records("runs/encoder", "accuracy") == whole

    assert main([*words, "weights=encoder.safetensors", "evaluation.head=true", "to=not"]) == 2
    assert capsys.readouterr().err == (
        "encoder.safetensors has no classifier (fc.bias is missing); leave out evaluation.head=true.\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["encoder=timm:test_vit", "weights=null"], ""),
        (["encoder=timm:vit_tiny_patch16_224.augreg_in21k", "weights=null"], "has 21843 classes, and"),
        (["RUN"], "needs an encoder with a classifier of its own"),
    ],
)
def test_who_has_a_classifier(
    runs: Path, photos: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    for shape, texture in (("cat", "dog"), ("dog", "cat")):
        for i in (1, 2):
            Path("stimuli", shape).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / "test" / shape / f"{i}.png", Path("stimuli", shape, f"{shape}{i}-{texture}{i}.png"))
    words = [f"run={runs}/run" if word == "RUN" else word for word in words]
    words += ["dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", "hardware=cpu", "to=it"]
    words += ["evaluation=shape", "evaluation.stimuli=stimuli", "evaluation.probe_epochs=1", "evaluation.head=true"]
    assert main(words) == (2 if sentence else 0)
    assert sentence in capsys.readouterr().err
    if sentence:
        assert not Path("it").exists()
        assert not list(Path(".cache").rglob("*.safetensors"))  # nothing was done for it
    else:
        assert {record.n for record in records("it", "shape", classifier="head")} == {4}


@pytest.mark.parametrize(("name", "size"), [("timm:test_vit", 160), ("torchvision:inception_v3", 299)])
def test_the_size_that_weights_are_meant_for(name: str, size: int) -> None:
    assert find("encoder", name, None).image_size == size
    assert find("encoder", name, "null").image_size is None


def test_features_are_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["encoder=torchvision:resnet18", "weights=null", "dataset=imagefolder", f"dataset.root={photos}", *FAST]
    words.append("dataset.image_size=32")
    assert main([*words, "to=one"]) == 0
    kept = sorted(Path(".cache/icl-msr/features").rglob("*.safetensors"))
    assert len(kept) == 4  # train, test, and two crops of test
    with monkeypatch.context() as patched:
        patched.setattr("icl_msr.evaluation.cache.extract", None)
        assert main([*words, "to=two"]) == 0
    assert records("one", "accuracy") == records("two", "accuracy")
    kept[0].write_bytes(b"cut short")
    assert main([*words, "to=three"]) == 0
    assert records("one", "accuracy") == records("three", "accuracy")
    assert len(kept[0].read_bytes()) > 1000
    assert main([*words, "seed=5", "to=four"]) == 0  # other weights
    assert len(list(Path(".cache/icl-msr/features").rglob("*.safetensors"))) == 8


def test_an_encoder_is_fed_as_it_was_trained(runs: Path, photos: Path) -> None:
    """On other data it keeps the statistics of its own."""
    words = ["dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", *FAST]
    assert main([f"run={runs}/run", *words, "to=it"]) == 0
    files = Path(".cache/icl-msr/features").rglob("*.safetensors")
    kept = [features for file in files if len(features := load_file(file)["features"]) == 8]
    other, own = build(check(composed(*words[:3])).dataset), tiny_dataset()
    backbone, _ = load_encoder(runs / "exported")
    expected = extract(backbone, other.tests["test"], mean=own.mean, std=own.std, device="cpu", batch_size=8)
    assert any(torch.allclose(features, expected, atol=1e-5) for features in kept)  # the others are of crops


def test_what_follows_the_seed_of_a_run_is_no_setting_of_its_own(runs: Path, photos: Path) -> None:
    shutil.copytree(runs / "run", "run")
    config = OmegaConf.load("run/config.yaml")
    config.regularizer.seed = "${seed}"  # as MSR's
    OmegaConf.save(config, "run/config.yaml")
    words = ["dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", *FAST]
    assert main(["run=run", *words, "to=it"]) == 0
    recorded = OmegaConf.to_container(OmegaConf.load("it/config.yaml"), resolve=False)
    assert recorded["regularizer"]["seed"] == "${seed}"
    assert "evaluation_seed" not in recorded
    assert main(["run=run", *words, "seed=4", "to=other"]) == 0  # other labels, held-out images, order
    assert OmegaConf.load("other/config.yaml").evaluation_seed == 4
    assert recorded["seed"] == 3
    assert recorded["dataset"]["root"] == str(photos)


def test_several_evaluations_at_once_and_their_report(
    runs: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["evaluation=[light,corruptions]", "evaluation.corruptions=[fog,contrast]", "evaluation.severities=[1,5]"]
    few += ["evaluation.probe_epochs=2", "evaluation.images=5", "evaluation.bootstrap=20"]
    words = [f"run={runs}/run", "dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", *few]
    assert main([*words, "hardware=cpu", "to=runs/with"]) == 0
    assert "fog" in capsys.readouterr().out
    found = results("runs/with")
    accuracies = records("runs/with", "accuracy", encoder="trained")
    assert [record.split for record in accuracies] == ["test", "clean", "corrupted"]
    corruptions = records("runs/with", "corruption")
    assert len(corruptions) == 2 * (2 * 2 + 2 + 1)  # encoders; corruptions by severity, alone, together
    assert {record.n for record in corruptions} == {5}
    assert found["choices"] == {
        "method": "moco",
        "regularizer": "none",
        "pretrained_on": "confounded",
        "dataset": f"imagefolder {photos.name}",
        "evaluation": "light+corruptions",
    }
    saved = np.load("runs/with/predictions.npz")
    assert saved["trained/linear/train/corrupted"].shape == (5 * 4,)
    assert main(["encoder=torchvision:resnet18", "weights=null", *words[1:], "hardware=cpu", "to=runs/other"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert records("runs/with", "accuracy")
    assert report(["runs"]) == 0
    table = capsys.readouterr().out
    assert f"imagefolder {photos.name}" in table
    summary = json.loads(Path("runs/summary.json").read_text())
    assert len(summary["configurations"]) == 2
    assert not summary["failed"]
    assert report(["runs/with"]) == 0


def test_the_table_of_five_columns(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Terminal, page and the table of several runs have the same columns: clean, corrupted, and each folder given."""
    for name, change in (("drawn", lambda image: image.convert("L")), ("negative", ImageOps.invert)):
        for file in sorted((photos / "test").rglob("*.png"))[1:]:
            to = Path(name, file.parent.name, file.name)
            to.parent.mkdir(parents=True, exist_ok=True)
            change(Image.open(file)).save(to)
    words = ["weights=null", "dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", "hardware=cpu"]
    words += [f"+dataset.shifted.{name}={Path(name).absolute()}" for name in ("drawn", "negative")]
    words += ["evaluation.probe_epochs=3", "evaluation.bootstrap=20"]
    few = ["evaluation.corruptions=[fog,contrast]", "evaluation.severities=[1,5]"]
    columns = ["clean", "corrupted", "drawn", "negative"]
    assert main([*words, "encoder=torchvision:resnet18", "evaluation=robustness", *few, "to=runs/a"]) == 0
    out = capsys.readouterr().out
    found: dict[str, Any] = {record.split: record for record in records("runs/a", "accuracy")}
    assert list(found) == columns
    heading, row = out[out.index("classifier") :].splitlines()[:2]
    assert heading.split()[-4:] == columns
    assert row.split() == ["train", "linear", "trained", *(f"{100 * found[name].value:.1f}" for name in columns)]
    each = [record.value for record in records("runs/a", "corruption") if record.told("severity") != "mean"]
    assert len(each) == 4
    assert found["corrupted"].value == pytest.approx(np.mean(each))
    assert [found[name].n for name in columns] == [8, 8, 7, 7]

    assert main([*words, "encoder=torchvision:resnet18", "evaluation=default", "evaluation.knn=[]", "to=usual"]) == 0
    usual = {record.split: record for record in records("usual", "accuracy")}
    for name, other in (("clean", "test"), ("drawn", "drawn"), ("negative", "negative")):
        assert replace(found[name], split="") == replace(usual[other], split="")

    assert main([*words, "encoder=torchvision:mnasnet0_5", "evaluation=robustness", *few, "to=runs/b"]) == 0
    page = Path("runs/b/report.html").read_text()
    table = page[page.index('<table class="accuracy">') :]
    assert re.findall(r"<th>(\w+)", table[: table.index("</thead>")]) == columns
    assert report(["runs"]) == 0
    markdown = Path("runs/summary.md").read_text().splitlines()
    header, first = (line.strip("| ").split(" | ") for line in (markdown[2], markdown[5]))
    assert first[0] == "torchvision:resnet18"
    assert header[-4:] == [f"{name} (linear)" for name in columns]
    assert [cell.strip("*") for cell in first[-4:]] == [f"{100 * found[name].value:.1f}" for name in columns]


def test_what_is_left_without_content(runs: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run={runs}/run", "dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32", "to=it"]
    words += ["hardware=cpu", "evaluation=textures", "evaluation.probe_epochs=2", "evaluation.bootstrap=20"]
    words += ["evaluation.generators.patch.largest=30", "~evaluation.generators.texture", "evaluation.untrained=false"]
    assert main(words) == 0
    assert "only_phase" in capsys.readouterr().out
    shown = ["test", "only_patch", "only_phase"]
    told = records("it", "texture", classifier="linear", metric="accuracy")
    assert [record.told("images") for record in told] == shown
    assert {row.split for row in Outcome.load(Path("it")).records.by_class} == set(shown)
    assert results("it")["classes"] == ["cat", "dog"]
    assert any("cat" in record.note or "dog" in record.note for record in told)
    saved = Path("it", "config.yaml").read_text()
    assert "largest: 30" in saved


def test_transfer(runs: Path, photos: Path) -> None:
    """A run's encoder on data that it was not trained on: the same probe, on the classes of the other data."""
    words = [f"run={runs}/run", "dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32"]
    words += ["hardware=cpu", "evaluation.probe_epochs=5", "evaluation.bootstrap=20"]
    assert main([*words, "evaluation=[default,moco_probe]", "to=photos"]) == 0
    found = results("photos")
    assert found["classes"] == ["cat", "dog"]
    assert found["choices"]["pretrained_on"] == "confounded"
    assert found["choices"]["dataset"] == f"imagefolder {photos.name}"
    top1 = {str(record.classifier): record.value for record in records("photos", "accuracy", encoder="trained")}
    assert list(top1) == ["knn-dino", "knn-wmse", "linear", "linear-moco"]
    assert top1["linear"] == 1  # cats are dark, dogs are light
    assert {(probe.encoder, str(probe.classifier)) for probe in records("photos", "choice")} == {
        (encoder, classifier) for encoder in ("trained", "untrained") for classifier in ("linear", "linear-moco")
    }


def test_some_of_the_labels_and_fine_tuning(runs: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run={runs}/run", "dataset=imagefolder", f"dataset.root={photos}", "dataset.image_size=32"]
    words += ["hardware=cpu", "evaluation.bootstrap=20", "evaluation.tune_epochs=2", "evaluation.probe_epochs=5"]
    fractions = "evaluation.fractions=[0.01,0.5]"
    assert main([*words, "evaluation=semi_supervised", fractions, "to=some"]) == 0
    out = capsys.readouterr().out
    assert "Labels used" in out
    assert "one image of each is used" in out
    names = [str(record.classifier) for record in records("some", "accuracy", encoder="trained")]
    assert names == ["linear-1%", "finetune-1%", "linear-50%", "finetune-50%"]
    used = records("some", "labels", metric="images")
    assert [record.value for record in used] == [2, 12]
    assert "labelled-50%.txt" in [record.told("file") for record in used]
    chosen = Path("some/labelled-50%.txt").read_text().split()
    assert len(chosen) == 12
    assert set(chosen) < {f"{name}/{i}.png" for name in ("cat", "dog") for i in range(12)}
    assert "Labels used" in Path("some/report.html").read_text()

    files = "evaluation.files=[some/labelled-1%.txt,some/labelled-50%.txt]"
    assert main([*words, "evaluation=semi_supervised", fractions, files, "to=again"]) == 0
    assert records("again", "accuracy") == records("some", "accuracy")

    assert main([*words, "evaluation=[light,finetune]", "to=all"]) == 0
    names = [str(record.classifier) for record in records("all", "accuracy", encoder="trained")]
    assert names == ["knn-dino", "finetune"]
    assert not list(Path("all").glob("labelled*"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["Nothing is given to evaluate", "run=FOLDER"]),
        (["run=a", "encoder=b"], ["run and encoder are given; give one"]),
        (["run=a", "run=b"], ["run is given twice"]),
        (["a"], ["a is not of the form key=value"]),
        (["run=nowhere"], ["There is no run nowhere"]),
        (["checkpoint=nowhere"], ["There is no checkpoint nowhere"]),
        (["encoder=nowhere.safetensors"], ["There is no encoder nowhere.safetensors"]),
        (["encoder=tim:resnet18"], ["unknown library; did you mean timm?"]),
        (["encoder=timm:resnet1"], ["is not a timm model; did you mean"]),
        (["encoder=torchvision:resnet19"], ["is not a torchvision model; did you mean", "resnet18"]),
        (["encoder=torchvision:r3d_18"], ["is not a torchvision model"]),
        (["encoder=timm:test_vit", "method=byol"], ["method is not a key of an evaluation"]),
        (["encoder=timm:test_vit", "datset=cifar10"], ["did you mean dataset?"]),
        (["encoder=timm:test_vit", "dataset=cifar"], ["dataset=cifar does not exist; did you mean"]),
        (["encoder=timm:test_vit", "evaluation=[default,corrupt]"], ["evaluation=corrupt does not exist"]),
        (["encoder=timm:test_vit", "evaluation.kn=[dino]"], ["evaluation.default.kn is not a key"]),
        (["encoder=timm:test_vit", "dataset.train=0"], ["dataset.train=0 is not allowed"]),
        (["encoder=timm:test_vit", "evaluation=corruptions", "evaluation.corruptions=[frost]"], ["frost", "fog"]),
        (["encoder=timm:test_vit", "evaluation=shape"], ["evaluation.shape.stimuli has no value yet"]),
        (["encoder=timm:test_vit", "evaluation=textures", "evaluation.superclasses=no.csv"], ["no.csv is not a file"]),
        (["encoder=timm:test_vit", "evaluation=finetune", "evaluation.fractions=[0]"], ["fractions", "greater than 0"]),
        (["encoder=timm:test_vit", "evaluation=finetune", "evaluation.fractions=[2]"], ["fractions", "at most 1"]),
        (["encoder=timm:test_vit", "evaluation=semi_supervised", "evaluation.files=[a]"], ["1 and 2 entries"]),
        (["encoder=timm:test_vit", "evaluation=semi_supervised", "evaluation.files=[a,b]"], ["a cannot be read"]),
        (["encoder=timm:test_vit", "evaluation=finetune", "evaluation.tune_optimizer=adam"], ["adam", "adamw"]),
        (["encoder=timm:test_vit", "evaluation.probe=simclr"], ["evaluation.default.probe", "wmse"]),
        (["encoder=timm:test_vit", "evaluation=none"], ["evaluation=none measures nothing"]),
        (["encoder=timm:test_vit", "weights=null", "to=/proc/none"], ["/proc/none cannot be written", "to=FOLDER"]),
        (["encoder=timm:test_vit", "weights=null", "cache=/proc/none"], ["cannot be kept in /proc/none", "cache=null"]),
        (["encoder=timm:test_vit", "weights=file"], ["weights=file is neither a .safetensors file"]),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, before any work, and no trace."""
    small = DATA if any(word.startswith("encoder=timm:test_vit") for word in words) else []
    small = [word for word in small if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    small = [] if "dataset=cifar" in words else small
    assert main([*words, *small]) == 2
    out, err = capsys.readouterr()
    assert "Accuracy" not in out
    (line,) = err.splitlines()
    assert all(part in line for part in parts), line
    assert line.endswith((".", "?"))
    assert not Path("runs").exists()


def test_results_are_not_overwritten(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoder=timm:test_vit", f"to={runs}/run"]) == 2
    assert "holds results or a run already" in capsys.readouterr().err


def test_a_run_whose_encoder_takes_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = foreign_encoder("timm", "vit_tiny_patch16_224", 32, None, 0)
    images = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "dataset": "confounded"}
    (tmp_path / "vit").mkdir()
    export_encoder(backbone, tmp_path / "vit", images)
    assert main([f"encoder={tmp_path}/vit", *DATA, "dataset.image_size=48", *FAST]) == 2
    err = capsys.readouterr().err
    assert "cannot take images of 48 pixels" in err
    assert "set dataset.image_size=32." in err


def test_seeded_weights_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, two = (foreign_encoder("torchvision", "resnet18", 32, None, seed) for seed in (7, 7))
    copy = untrained_copy(one, 7)
    other = untrained_copy(one, 8)
    assert torch.equal(torch.rand(3), expected)
    weight = "net.conv1.weight"
    states = [net.state_dict()[weight] for net in (one, two, copy, other) if net is not None]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])
