import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.data import confounded as module
from icl_msr.data.confounded import FAMILIES, SHAPES, confounded, draw, scenes
from icl_msr.data.dataset import ArraySplit, Dataset

SHA256 = "49b17af11f9501ae3202a95541e09f420dbaa965a9562ccd7fe53f0795e1e6f6"


def build(**changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "seed": 0, "image_size": 32, "classes": 10, "train": 60, "balanced": 20, "test": 40, "rho": 0.9,
        "train_on": "full", "cache": None,
    }  # fmt: skip
    return confounded(**(settings | changes))


def splits(data: Dataset) -> Iterator[ArraySplit]:
    for split in (data.train, data.balanced, *data.tests.values()):
        assert isinstance(split, ArraySplit)
        yield split


def images(data: Dataset, name: str) -> Tensor:
    return data.tests[name].load(torch.arange(len(data.tests[name])))


def true_masks(data: Dataset, name: str) -> Tensor:
    split = data.tests[name]
    assert isinstance(split, ArraySplit)
    assert split.masks is not None
    return split.masks


def grown(masks: Tensor) -> Tensor:
    """By two pixels: the soft edge at a sharp tip is that wide."""
    return F.max_pool2d(masks[:, None].float(), 5, stride=1, padding=2)[:, 0] > 0


def shrunk(masks: Tensor) -> Tensor:
    return ~grown(~masks)


def test_a_seed_gives_the_same_bytes_everywhere() -> None:
    digest = hashlib.sha256()
    for data in (build(), build(train_on="fg", image_size=48, seed=2**40 + 1)):
        for split in splits(data):
            for array in (split.images, split.labels, split.masks):
                digest.update(b"" if array is None else array.numpy().tobytes())
    assert digest.hexdigest() == SHA256, "the pixels changed: if that is meant, raise VERSION and record the new hash"


def test_another_seed_gives_other_images() -> None:
    assert not torch.equal(images(build(), "original"), images(build(seed=1), "original"))


def test_an_image_does_not_depend_on_its_batch() -> None:
    content = scenes(0, 10, train=50, balanced=10, test=10, rho=0.9)["train"]
    together, masks = draw(0, content, torch.arange(50), 32)
    for index in (0, 7, 49):
        alone, mask = draw(0, content, torch.tensor([index]), 32)
        assert torch.equal(alone[0], together[index])
        assert torch.equal(mask[0], masks[index])


def test_counts_shapes_and_types() -> None:
    data = build(train=61, balanced=23, test=17, image_size=40, classes=7)
    assert (len(data.train), len(data.balanced or []), {len(split) for split in data.tests.values()}) == (61, 23, {17})
    assert set(data.tests) == {"original", "mixed_same", "mixed_rand", "only_fg", "only_bg", "fg"}
    assert len(data.classes) == 7
    for split in splits(data):
        n = len(split)
        assert (split.images.shape, split.images.dtype) == ((n, 3, 40, 40), torch.uint8)
        assert (split.labels.dtype, int(split.labels.max())) == (torch.int64, 6)
        assert split.labels.bincount().amin() >= n // 7  # classes are balanced
        assert split.masks is None or (split.masks.shape, split.masks.dtype) == ((n, 40, 40), torch.bool)


def test_every_class_has_its_family() -> None:
    assert len(SHAPES) == len(FAMILIES) >= 10


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9, 1.0])
def test_background_agrees_with_the_class_with_probability_rho(rho: float) -> None:
    plan = scenes(3, 10, train=20_000, balanced=20_000, test=20_000, rho=rho)
    for name, expected in (("train", rho), ("original", rho), ("balanced", 0.1), ("mixed_rand", 0.1)):
        content = plan[name]
        assert content.families is not None
        agreement = (content.families == content.labels).double().mean().item()
        assert abs(agreement - expected) <= 4 * (expected * (1 - expected) / 20_000) ** 0.5, name


@pytest.mark.parametrize("name", ["mixed_rand", "balanced"])
def test_random_backgrounds_say_nothing_about_the_class(name: str) -> None:
    content = scenes(5, 10, train=10, balanced=20_000, test=20_000, rho=0.9)[name]
    assert content.families is not None
    counts = torch.bincount(content.labels * 10 + content.families, minlength=100).double()
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert chi2 < 99 + 4 * (2 * 99) ** 0.5


def test_disagreeing_backgrounds_come_from_all_other_families() -> None:
    content = scenes(0, 10, train=20_000, balanced=10, test=10, rho=0.5)["train"]
    assert content.families is not None
    shift = ((content.families - content.labels) % 10).bincount(minlength=10).double()
    assert ((shift[1:] - 10_000 / 9).abs() < 4 * (10_000 / 9) ** 0.5).all()


def test_splits_show_the_same_objects() -> None:
    data = build()
    inside = shrunk(true_masks(data, "original"))[:, None].expand(-1, 3, -1, -1)
    assert inside.float().mean() > 0.02
    for name in ("mixed_same", "mixed_rand", "only_fg"):
        assert torch.equal(images(data, name)[inside], images(data, "original")[inside]), name
        assert torch.equal(data.tests[name].labels, data.tests["original"].labels)


def test_backgrounds_differ_where_they_should() -> None:
    data = build()
    outside = ~grown(true_masks(data, "original"))[:, None].expand(-1, 3, -1, -1)
    original = images(data, "original")
    assert torch.equal(images(data, "only_bg")[outside], original[outside])
    for name in ("mixed_same", "mixed_rand"):
        same = (images(data, name) == original) | ~outside
        assert not same.flatten(1).all(1).any(), name


def test_masks_are_where_the_object_is() -> None:
    data = build()
    visible = images(data, "only_fg").amax(1) > 0
    masks = true_masks(data, "only_fg")
    assert (visible[masks]).all()
    assert not visible[~grown(masks)].any()
    changed = (images(data, "original") != images(data, "only_bg")).any(1)
    assert changed[shrunk(masks)].double().mean() > 0.99
    assert data.tests["only_bg"].masks is None  # type: ignore[attr-defined]


def test_objects_stand_out() -> None:
    data = build(test=200)
    inside = true_masks(data, "original").double()
    outside = 1 - grown(true_masks(data, "original")).double()
    for name in ("original", "mixed_same", "mixed_rand"):
        light = images(data, name).double().mean(1)
        means = [(light * where).sum((1, 2)) / where.sum((1, 2)) for where in (inside, outside)]
        assert (means[0] - means[1]).abs().amin() > 40, name


def test_foreground_training_cuts_train_and_nothing_else() -> None:
    full, cut = build(), build(train_on="fg")
    for name in full.tests:
        assert torch.equal(images(full, name), images(cut, name)), name
    assert isinstance(full.train, ArraySplit)
    assert isinstance(cut.train, ArraySplit)
    assert full.train.masks is not None
    assert cut.train.masks is not None
    assert torch.equal(full.train.labels, cut.train.labels)
    assert cut.train.masks.any(1).double().mean() > 0.7 > full.train.masks.any(1).double().mean()


@pytest.mark.parametrize(("rho", "classes"), [(0.05, 10), (0.2, 4), (1.01, 10), (-0.1, 10)])
def test_rho_out_of_range_is_refused(rho: float, classes: int) -> None:
    with pytest.raises(UserError, match=f"with {classes} classes"):
        build(rho=rho, classes=classes)


def test_cache_gives_back_what_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "cache")
    first = build(cache=folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_generate", lambda *_: pytest.fail("drawn again"))
        second = build(cache=folder)
    for a, b, fresh in zip(splits(first), splits(second), splits(build()), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(b.images, fresh.images)
        assert (b.masks is None) == (a.masks is None)
        assert b.masks is None or (a.masks is not None and torch.equal(a.masks, b.masks))
    build(cache=folder, seed=1)
    build(cache=folder, rho=0.8)
    assert len(list(Path(folder).iterdir())) == 3  # one file a recipe, nothing unfinished


def test_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.cache=null"):
        build(cache=str(tmp_path / "file"))
