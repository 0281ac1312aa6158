"""Fine-tuning, on the flat images of conftest.py and on photographs."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import permutation
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.files import FileSplit
from icl_msr.evaluation.finetune import FineTuning, augmented, fine_tune
from icl_msr.evaluation.suite import Evaluation, Results
from icl_msr.models.backbones import tiny
from icl_msr.training.datamodule import Batch, _Crops

Make = Callable[..., FineTuning]


@pytest.fixture
def make() -> Make:
    def build(**keys: Any) -> FineTuning:
        standard: dict[str, Any] = {
            "knn": [],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-2, 1e-1],
            "probe_epochs": 5,
            "probe_batch_size": 64,
            "probe_held_out": 0.2,
            "bootstrap": 100,
            "untrained": True,
            "batch_size": 64,
            "fractions": [1.0],
            "files": None,
            "finetune": True,
            "tune_optimizer": "adamw",
            "tune_learning_rates": [1e-2],
            "tune_head_learning_rate": 1e-1,
            "tune_weight_decay": 1e-4,
            "tune_epochs": 5,
            "tune_batch_size": 64,
            "tune_held_out": 0.2,
            "tune_crop": [0.9, 1.0],
            "tune_flip": 0.5,
        }
        return FineTuning(**(standard | keys))

    return build


class Blind(nn.Module):
    """It sees the corner alone, which says nothing where backgrounds are random; but it can learn to see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 16)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        with torch.no_grad():
            self.layer.weight[:, 0] = torch.linspace(-1, 1, 16)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.layer(images.flatten(1)))


@pytest.fixture
def random_backgrounds(dataset: Dataset) -> Dataset:
    """Trained and tested where the background says nothing."""
    assert dataset.balanced is not None
    dataset.train, dataset.balanced = dataset.balanced, None
    dataset.tests = {"mixed_rand": dataset.tests["mixed_rand"]}
    return dataset


def top1(results: Results, encoder: str = "trained") -> dict[str, float]:
    accuracies = results.records.where("accuracy", encoder=encoder)
    return {str(row.classifier): row.value for row in accuracies if row.value is not None}


def test_learns_what_is_not_in_the_features(make: Make, random_backgrounds: Dataset) -> None:
    results = make(tune_epochs=40)(Blind(), random_backgrounds, device="cpu", seed=0)
    found = top1(results)
    assert found["linear"] < 0.4
    assert found["finetune"] > 0.9


def test_the_encoder_stays_as_it_is(make: Make, random_backgrounds: Dataset) -> None:
    torch.manual_seed(0)
    encoder = tiny(8, weights=None).train()
    frozen = encoder.net.get_parameter("conv1.weight").requires_grad_(False)
    before, modes = copy.deepcopy(encoder.state_dict()), [m.training for m in encoder.modules()]
    drawn = torch.get_rng_state()
    evaluation = make(tune_epochs=1)
    evaluation(encoder, random_backgrounds, device="cpu", seed=0)
    tuned = fine_tune(encoder, random_backgrounds, torch.arange(20), evaluation.recipe, 1e-2, device="cpu", seed=0)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert [m.training for m in encoder.modules()] == modes
    assert all(p.grad is None for p in encoder.parameters())
    assert not frozen.requires_grad
    assert tuned is not None
    assert not torch.equal(tuned.get_parameter("0.net.conv1.weight"), frozen)  # all of the copy is trained


def test_repeats_itself_and_depends_on_the_seed(make: Make, random_backgrounds: Dataset) -> None:
    class Dropping(Blind):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(images), 0.2, self.training)

    torch.manual_seed(5)
    network = Dropping()
    recipe = make(tune_epochs=2).recipe
    index = torch.arange(100)

    def weight(seed: int) -> Tensor:
        torch.rand(1)
        tuned = fine_tune(network, random_backgrounds, index, recipe, 1e-2, device="cpu", seed=seed)
        assert tuned is not None
        return next(tuned.parameters()).detach()

    one, again, other = weight(0), weight(0), weight(1)
    with torch.inference_mode():
        inside = weight(0)
    assert torch.equal(one, again)
    assert torch.equal(one, inside)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_plain_loop(make: Make, random_backgrounds: Dataset, optimizer: str) -> None:
    """Image by image, one update after the other, as the papers write them."""
    dataset, epochs, seed, decay, head_rate = random_backgrounds, 3, 4, 0.1, 0.3
    torch.manual_seed(0)
    keys = {"tune_epochs": epochs, "tune_batch_size": 16, "tune_weight_decay": decay, "tune_optimizer": optimizer}
    recipe = make(**keys, tune_head_learning_rate=head_rate, tune_crop=[0.3, 1.0]).recipe
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)
    )
    index = torch.arange(0, 100, 2)
    tuned = fine_tune(encoder, dataset, index, recipe, 0.05, device="cpu", seed=seed)
    assert tuned is not None

    plain = nn.Sequential(copy.deepcopy(encoder), nn.Linear(5, 4)).train()
    plain[1].weight.data.zero_()
    plain[1].bias.data.zero_()
    labels, steps, step = dataset.train.labels, 4, 0  # 50 images in batches of 16 are 13, 13, 12 and 12
    state: dict[str, tuple[Any, Any]] = {}
    for epoch in range(epochs):
        order = index[permutation(seed, epoch, len(index))]
        for begin, end in ((0, 13), (13, 26), (26, 38), (38, 50)):
            batch = order[begin:end]
            images = [
                recipe.augmentation(
                    dataset.train.load(i[None]),
                    i[None],
                    seed=seed,
                    epoch=epoch,
                    size=8,
                    mean=dataset.mean,
                    std=dataset.std,
                )[0]
                for i in batch
            ]
            plain.zero_grad()
            cross_entropy(plain(torch.cat(images)), labels[batch]).backward()
            factor = (1 + math.cos(math.pi * step / (epochs * steps))) / 2
            step += 1
            for name, p in plain.named_parameters():
                lr = factor * (0.05 if name.startswith("0.") else head_rate)
                wd, g = decay * (p.ndim > 1), p.grad
                assert g is not None
                with torch.no_grad():
                    if optimizer == "sgd":
                        velocity = 0.9 * state[name][0] + g + wd * p if name in state else g + wd * p
                        state[name] = (velocity, None)
                        p -= lr * velocity
                    else:
                        m, v = state.get(name, (0, 0))
                        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                        state[name] = (m, v)
                        p *= 1 - lr * wd
                        p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for ours, theirs in zip(tuned.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.fixture
def photos(tmp_path: Path) -> Dataset:
    """24 photographs of two classes and of several sizes, in files."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(24):
        pixels = rng.integers(0, 120, (30 + i, 50, 3)) + 120 * (i % 2)
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    labels = torch.arange(24) % 2
    train, test = FileSplit(files[:16], labels[:16], 16), FileSplit(files[16:], labels[16:], 16)
    return Dataset("photos", ["dark", "light"], 16, train, {"test": test})


def test_photographs_are_cut_in_their_own_resolution(make: Make, photos: Dataset) -> None:
    """As they are for pre-training."""
    augmentation = make(tune_crop=[0.2, 0.9]).recipe.augmentation
    batches = [torch.tensor([3, 1, 15]), torch.tensor([0, 8])]
    ours = list(augmented(photos, batches, augmentation, seed=7, epoch=2, device=torch.device("cpu")))
    assert isinstance(photos.train, FileSplit)
    workers = _Crops(photos.train, None, augmentation, [16], 7, whole_images=False, reduced_jpeg=False)
    for batch, images in zip(batches, ours, strict=True):
        cut = workers[Batch(2, batch)]
        assert isinstance(cut, Batch)
        assert cut.crops is not None
        expected = augmentation(
            cut.crops, batch, seed=7, epoch=2, size=16, mean=photos.mean, std=photos.std, cropped=True
        )
        assert torch.equal(images, expected[0])


def test_a_broken_photograph(make: Make, photos: Dataset) -> None:
    assert isinstance(photos.train, FileSplit)
    Path(photos.train.files[2]).write_bytes(b"no image")
    with pytest.raises(UserError, match="is not an image of a known format"):
        make(linear=False)(tiny(16, weights=None), photos, device="cpu", seed=0)


def test_photographs(make: Make, photos: Dataset) -> None:
    torch.manual_seed(0)
    evaluation = make(fractions=[0.5, 1.0], tune_batch_size=4, tune_epochs=20, tune_learning_rates=[1e-3])
    results = evaluation(tiny(16, weights=None), photos, device="cpu", seed=0)
    found = top1(results)
    assert list(found) == ["linear-50%", "finetune-50%", "linear", "finetune"]
    assert min(found.values()) > 0.9
    assert list(results.lists) == ["labelled-50%.txt"]
    assert set(results.lists["labelled-50%.txt"]) < {f"{i}.png" for i in range(16)}


def test_records(make: Make, dataset: Dataset, object_encoder: nn.Module, background_encoder: nn.Module) -> None:
    evaluation = make(fractions=[0.02, 0.1], knn=["dino"], tune_epochs=1)
    results = evaluation(object_encoder, dataset, device="cpu", seed=0, untrained_encoder=background_encoder)
    json.dumps(results.records.to_json(), allow_nan=False)
    accuracies = results.records.where("accuracy")
    names = [record.name for record in accuracies]
    assert names == 2 * evaluation.names(dataset)
    kinds = [f"{kind}-{part}%" for part in (2, 10) for kind in ("knn-dino", "linear", "finetune")]
    assert list(dict.fromkeys(name.partition("/")[0] for name in names)) == kinds
    assert {str(gap.classifier) for gap in results.records.where("gap")} == set(kinds)
    assert len(results.records.by_class) == len(accuracies)
    for row in accuracies:
        key = "/".join([row.encoder, str(row.classifier), row.fitted_on, row.split])
        assert row.value == pytest.approx(
            np.mean(results.predictions[key] == results.predictions[f"labels/{row.split}"])
        )
    # The frozen part is what the standard evaluation would find with these labels alone.
    assert isinstance(dataset.train, ArraySplit)
    index = torch.tensor([int(i) for i in results.lists["labelled-10%.txt"]])
    few = ArraySplit(dataset.train.images[index], dataset.train.labels[index])
    standard = Evaluation(
        knn=["dino"], linear=True, probe="ours", learning_rates=[1e-2, 1e-1], probe_epochs=5, probe_batch_size=64,
        probe_held_out=0.2, bootstrap=100, untrained=False, batch_size=64,
    )  # fmt: skip
    alone = standard(object_encoder, Dataset("few", dataset.classes, 8, few, dataset.tests), device="cpu", seed=0)
    ours = [row for row in accuracies if row.encoder == "trained"]
    for row in alone.records.where("accuracy"):
        assert row.classifier is not None
        assert replace(row, classifier=replace(row.classifier, fraction=0.1)) in ours
    used = {(row.told("part"), row.metric): row.value for row in results.records.where("labels")}
    assert [(used[part, "images"], used[part, "fewest"]) for part in ("2%", "10%")] == [(8, 2), (40, 10)]
    assert {(str(c.classifier), c.encoder) for c in results.records.where("choice")} == {
        (f"linear-{part}%", encoder) for part in (2, 10) for encoder in ("trained", "untrained")
    }


def test_a_grid_is_decided_on_a_held_out_part(make: Make, random_backgrounds: Dataset) -> None:
    grid = [1e-2, 1e-6, 1e30]
    results = make(linear=False, tune_epochs=40, tune_learning_rates=grid)(
        Blind(), random_backgrounds, device="cpu", seed=0
    )
    (chosen,) = results.records.where("choice", metric="chosen")
    assert str(chosen.classifier) == "finetune"
    assert chosen.value == 1e-2
    tried = results.records.where("choice", metric="held_out")
    held: dict[float, Any] = {record.told("learning_rate"): record.value for record in tried}
    assert list(held) == [1e-6, 1e-2, 1e30]
    assert held[1e-2] > 0.8 > 0.5 > held[1e-6]
    assert held[1e30] < 0.5
    assert chosen.note == ""
    alone = make(linear=False, tune_epochs=40)(Blind(), random_backgrounds, device="cpu", seed=0)
    assert alone.records.where("choice") == []
    assert alone.records.where("accuracy") == results.records.where("accuracy")


def test_what_diverges_says_so(make: Make, random_backgrounds: Dataset) -> None:
    wild = make(linear=False, tune_optimizer="sgd", tune_learning_rates=[1e30], tune_head_learning_rate=1e30)
    with pytest.raises(
        UserError, match="diverged at the learning rates 1e\\+30 of the encoder and 1e\\+30 of the head"
    ):
        wild(tiny(8, weights=None), random_backgrounds, device="cpu", seed=0)


def test_mistakes(make: Make, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have 1 and 2 entries"):
        make(fractions=[0.1, 0.2], files=["a"])
    with pytest.raises(UserError, match="nowhere cannot be read"):
        make(fractions=[0.1], files=[str(tmp_path / "nowhere")]).names(dataset)
    dataset.train.labels = torch.full_like(dataset.train.labels, -1)
    with pytest.raises(UserError, match="flat has no training images with a label"):
        make().names(dataset)


def test_lists_are_followed(make: Make, dataset: Dataset, object_encoder: nn.Module, tmp_path: Path) -> None:
    evaluation = make(fractions=[0.1], tune_epochs=1)
    chosen = evaluation(object_encoder, dataset, device="cpu", seed=5)
    chosen.save(tmp_path)
    file = tmp_path / "labelled-10%.txt"
    again = make(fractions=[0.1], tune_epochs=1, files=[str(file)])(object_encoder, dataset, device="cpu", seed=5)
    assert again.records.where("accuracy") == chosen.records.where("accuracy")
    assert again.lists == chosen.lists
    expected = [
        replace(record, factors={**record.factors, "chosen_by": str(file)}) for record in chosen.records.where("labels")
    ]
    assert again.records.where("labels") == expected
    with np.load(tmp_path / "predictions.npz") as saved:
        assert "trained/finetune-10%/train/original" in saved


def test_a_list_is_not_all_labels(make: Make) -> None:
    with pytest.raises(UserError, match="is all of them; say which part"):
        make(files=["list.txt"], fractions=[1.0])
