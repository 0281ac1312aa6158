from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as F
import yaml
from pydantic import TypeAdapter, ValidationError

from icl_msr.augment import Augmentation, passes
from icl_msr.augment.recipe import Changes, Interval, Strengths
from icl_msr.core.randomness import keys, uniforms
from icl_msr.data.dataset import normalise

CONF = Path(__file__).parents[2] / "conf/augment"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(params=["compiled code", "passes"], autouse=True)
def _renderer(request, monkeypatch):
    if request.param == "passes":
        monkeypatch.setattr("icl_msr.augment.recipe._renderer", lambda images: passes.render)


def recipe(name="small", **changes):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert config.pop("_target_") == "icl_msr.augment.Augmentation"
    return Augmentation(**config | changes)


def pictures(n, size=32):
    return (uniforms(keys(1, 0, torch.arange(n), 0), 3 * size * size) * 256).to(torch.uint8).view(n, 3, size, size)


def views(augmentation, images, index, seed=0, epoch=0, size=32, **more):
    return augmentation(images, index, seed=seed, epoch=epoch, size=size, mean=MEAN, std=STD, **more)


FULL = {"blur": 0.5, "solarize": 0.2}


@pytest.mark.parametrize("name", ["small", "simclr", "moco_v2", "imagenet"])
def test_views_are_normalised_images(name):
    first, second = views(recipe(name), pictures(8), torch.arange(8))
    for view in (first, second):
        assert view.shape == (8, 3, 32, 32)
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        values = view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert values.min() > -1e-5
        assert values.max() < 1 + 1e-5
        assert values.std() > 0.05


def test_order_of_the_parts():
    fixed = recipe(
        scale=[1.0, 1.0],
        ratio=[1.0, 1.0],
        flip=1.0,
        jitter_probability=0.0,
        gray=1.0,
        blur=1.0,
        sigma=[0.7, 0.7],
        solarize=1.0,
    )
    images = pictures(3)
    (view, _) = views(fixed, images, torch.arange(3))
    expected = F.rgb_to_grayscale(images.float() / 255, 3).flip(-1)
    expected = F.solarize(F.gaussian_blur(expected, [15, 15], [0.7, 0.7]), 0.5)
    torch.testing.assert_close(view, normalise(expected * 255, MEAN, STD), atol=1e-4, rtol=0)


def test_bicubic_crops_stay_within_the_range_of_pixels():
    sharp = recipe(interpolation="bicubic", scale=[0.1, 0.2], jitter_probability=0.0, gray=0.0)
    images = (pictures(8) > 127).to(torch.uint8) * 255
    (view, _) = views(sharp, images, torch.arange(8))
    values = view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert values.min() > -1e-5
    assert values.max() < 1 + 1e-5
    assert not torch.allclose(
        view, views(recipe(scale=[0.1, 0.2], jitter_probability=0.0, gray=0.0), images, torch.arange(8))[0]
    )


def test_without_augmentation_the_view_is_the_image():
    plain = recipe(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0, jitter_probability=0.0, gray=0.0)
    images = pictures(3)
    for view in views(plain, images, torch.arange(3)):
        torch.testing.assert_close(view, normalise(images, MEAN, STD), atol=1e-5, rtol=0)


def test_probabilities_and_strengths():
    n = 4000
    images = torch.full((n, 3, 4, 4), 128, dtype=torch.uint8)
    images[:, 0, :, 2:] = 60
    still = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0, "jitter_probability": 0.0, "gray": 0.0}
    still["sigma"] = [1.0, 1.0]
    plain = normalise(images, MEAN, STD)

    def changed(**key):
        view = views(recipe(**still | {"views": [key]}), images, torch.arange(n), size=4)[0]
        return (view - plain).abs().amax((1, 2, 3)) > 1e-3

    for key, probability in (
        ("flip", 0.5),
        ("gray", 0.1),
        ("blur", 0.3),
        ("solarize", 0.7),
        ("jitter_probability", 0.8),
    ):
        share = changed(**{key: probability}).float().mean().item()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / n) ** 0.5, key

    chosen = [changed(**{key: 0.5}) for key in ("flip", "gray", "blur", "solarize", "jitter_probability")]
    correlation = torch.corrcoef(torch.stack(chosen).float())
    assert (correlation - torch.eye(5)).abs().max() < 4 / n**0.5

    only_brightness = {"jitter": [0.4, 0.0, 0.0, 0.0], "jitter_probability": 1.0}
    view = views(recipe(**still | {"views": [only_brightness]}), images, torch.arange(n), size=4)[0]
    factor = (view[:, 1, 0, 0] * STD[1] + MEAN[1]) / (128 / 255)
    assert 0.6 <= factor.min() < 0.61
    assert 1.39 < factor.max() <= 1.4001
    assert abs(factor.mean() - 1) < 0.02


def test_samples_views_epochs_and_seeds_differ():
    a, images = recipe(**FULL), pictures(1).expand(16, -1, -1, -1)
    first, second = views(a, images, torch.arange(16))
    drawn = torch.cat(
        [first, second, *views(a, images, torch.arange(16), epoch=1), *views(a, images, torch.arange(16), seed=1)]
    )
    assert len(drawn.flatten(1).unique(dim=0)) == 96


@pytest.mark.parametrize("size", [32, 48])
def test_a_view_does_not_depend_on_the_batch(size):
    n = 150
    a, images, index = recipe(**FULL), pictures(n, size), torch.arange(n) * 7
    whole = views(a, images, index, size=size)
    for chosen in (
        torch.tensor([3]),
        torch.tensor([149, 3]),
        torch.randperm(n, generator=torch.Generator().manual_seed(0)),
    ):
        part = views(a, images[chosen], index[chosen], size=size)
        for v in range(2):
            assert torch.equal(part[v], whole[v][chosen])


def test_autocast_changes_nothing():
    a, images, index = recipe(**FULL), pictures(4), torch.arange(4)
    plain = views(a, images, index)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, views(a, images, index)))


def test_crops_made_by_a_worker():
    a, images, index = recipe(views=[{}, {"size": 16}], blur=0.5), pictures(6, 64), torch.arange(6)
    boxes = a.crop_parameters(index, 64, 64, seed=5, epoch=2)
    crops = [
        torch.stack([F.resized_crop(x, *b, [s, s], antialias=True) for x, b in zip(images, box.tolist(), strict=True)])
        for box, s in zip(boxes, (32, 16), strict=True)
    ]
    from_worker = views(a, crops, index, seed=5, epoch=2, cropped=True)
    on_device = views(a, images, index, seed=5, epoch=2)
    for ours, theirs, side in zip(from_worker, on_device, (32, 16), strict=True):
        assert ours.shape == (6, 3, side, side)
        assert (ours - theirs).abs().mean() < 0.02  # the worker's crops are rounded to 8 bits


def test_each_view_can_have_a_recipe_of_its_own():
    byol = recipe(gray=0.2, views=[{"blur": 1.0}, {"blur": 0.1, "solarize": 0.2}, {"size": 16}])
    assert [r.blur for r in byol.recipes] == [1.0, 0.1, 0.0]
    assert [r.solarize for r in byol.recipes] == [0.0, 0.2, 0.0]
    assert [v.shape[-1] for v in views(byol, pictures(2), torch.arange(2))] == [32, 32, 16]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Changes, {"blurr": 1.0}),
        (Changes, {"blur": 1.5}),
        (Changes, {"scale": [1.0, 0.2]}),
        (Interval, [1.0, 0.2]),
        (Interval, [0.2]),
        (Strengths, [0.4, 0.4, 0.4, 0.6]),
        (Strengths, [0.4, 0.4, 0.4]),
    ],
)
def test_the_schema_refuses(kind, value):
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value, strict=True)
