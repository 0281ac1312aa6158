import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icl_msr.augment import Augmentation, kernel, passes, recipe
from icl_msr.core.randomness import keys, uniforms

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MOCO = {"scale": [0.2, 1.0], "ratio": [0.75, 4 / 3], "interpolation": "bilinear", "flip": 0.5, "gray": 0.2, "blur": 0.5}
MOCO |= {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_probability": 0.8, "sigma": [0.1, 2.0], "solarize": 0.0, "size": None}
RECIPES = {
    "MoCo v2": {},
    "sharp": {"blur": 0.0},
    "strong colours": {"jitter": [0.8, 0.8, 0.8, 0.5], "jitter_probability": 1.0, "gray": 0.0},
    "solarized": {"solarize": 0.5, "gray": 0.5},
    "bicubic": {"interpolation": "bicubic", "scale": [0.05, 1.0]},
    "blurred": {"blur": 1.0, "sigma": [0.05, 4.0]},
    "crops alone": {"jitter_probability": 0.0, "gray": 0.0, "blur": 0.0},
}


def pictures(n, height, width):
    """Return images with smooth parts, grays, saturated colours and noise."""
    numbers = uniforms(keys(1, 0, torch.arange(n), 0), 3 * height * width).view(n, 3, height, width)
    ramp = torch.linspace(0, 1, width).expand(height, width)
    images = torch.where(ramp < 0.3, ramp * numbers[:, :, :1, :1], numbers)
    images[:, :, : height // 5] = (images[:, :, : height // 5] > 0.5).float()
    images[:, :, height // 2 : height // 2 + 3] = images[:, :1, height // 2 : height // 2 + 3]
    return (images * 255).round().to(torch.uint8)


def draw(render, images, changes, size, index=None, **more):
    augmentation = Augmentation(**MOCO | changes, views=[{}, {}])
    chosen = pytest.MonkeyPatch()
    with chosen.context() as patch:
        if render is not None:
            patch.setattr(recipe, "_renderer", lambda images: render)
        index = torch.arange(len(images[0] if isinstance(images, list) else images)) if index is None else index
        return augmentation(images, index, seed=3, epoch=1, size=size, mean=MEAN, std=STD, **more)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (100, 80, 45), (12, 300, 8), (9, 9, 40)])
@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_the_pixels_are_those_of_the_passes(changes, height, width, size):
    images = pictures(24, height, width)
    for ours, expected in zip(
        draw(kernel.render, images, changes, size), draw(passes.render, images, changes, size), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=3e-4, rtol=0)  # 1/50 of the step of a byte
        shares = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99])
        for channel in range(3):
            quantiles = [views[:, channel].flatten().quantile(shares) for views in (ours, expected)]
            torch.testing.assert_close(*quantiles, atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.mean((0, 2, 3)), expected.mean((0, 2, 3)), atol=2e-6, rtol=0)


def test_large_views_of_photographs():
    images = pictures(6, 400, 333)
    for ours, expected in zip(draw(kernel.render, images, {}, 224), draw(passes.render, images, {}, 224), strict=True):
        torch.testing.assert_close(ours, expected, atol=3e-4, rtol=0)


def test_crops_made_by_a_worker():
    crops = [pictures(12, 33, 33), pictures(12, 33, 33).flip(0)]
    for ours, expected in zip(
        draw(kernel.render, crops, {}, 33, cropped=True), draw(passes.render, crops, {}, 33, cropped=True), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("render", [kernel.render, passes.render])
def test_the_layout_changes_no_pixel(render):
    images = pictures(5, 40, 40)
    rows, last = draw(render, images, {}, 24)[0], draw(render, images, {}, 24, memory_format=torch.channels_last)[0]
    assert rows.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(rows, last, atol=1e-6, rtol=0)


def test_the_number_of_threads_changes_nothing():
    images, before = pictures(7, 40, 40), torch.get_num_threads()
    try:
        views = []
        for threads in (1, 3, 20):
            torch.set_num_threads(threads)
            views.append(draw(kernel.render, images, {}, 24)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])


def test_strided_and_empty_images():
    images = pictures(6, 40, 40)
    expected = draw(kernel.render, images, {}, 24)[0]
    assert torch.equal(draw(kernel.render, images.contiguous(memory_format=torch.channels_last), {}, 24)[0], expected)
    assert torch.equal(draw(kernel.render, images[::2], {}, 24, index=torch.arange(0, 6, 2))[0], expected[::2])
    assert draw(kernel.render, images[:0], {}, 24)[0].shape == (0, 3, 24, 24)


def test_who_makes_the_views(monkeypatch):
    images = pictures(2, 8, 8)
    assert recipe._renderer(images) is kernel.render
    assert recipe._renderer(images.float()) is passes.render
    assert recipe._renderer(images.to("meta")) is passes.render
    expected = draw(kernel.render, images, {}, 8)
    monkeypatch.delitem(sys.modules, "icl_msr.augment.kernel")
    monkeypatch.delattr("icl_msr.augment.kernel")
    monkeypatch.setitem(sys.modules, "numba", None)  # an import of it fails
    assert recipe._renderer(images) is passes.render
    torch.testing.assert_close(draw(None, images, {}, 8), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("cannot cache"), EOFError()])
def test_code_that_cannot_be_kept_is_compiled_all_the_same(error, monkeypatch, capsys):
    kept, clock = [], iter([0.0, 7.0])

    def njit(types, cache=False, **options):
        kept.append(cache)
        if cache:
            raise error
        return lambda function: function

    monkeypatch.setattr(kernel, "njit", njit)
    monkeypatch.setattr(kernel, "perf_counter", lambda: next(clock))
    assert kernel._compiled.__wrapped__() is kernel._render
    assert kept == [True, False]
    assert capsys.readouterr().out == "The code that makes views was compiled for this machine (7 s).\n"


@pytest.mark.slow
def test_code_that_is_compiled_and_code_that_was_kept_give_the_same_bytes(tmp_path):
    """A run and its continuation are equal to the last bit, though only one of them compiles."""
    program = """
import hashlib, torch
from augment.test_kernel import RECIPES, draw, pictures
from icl_msr.augment import kernel
for changes in RECIPES.values():
    views = draw(kernel.render, pictures(24, 40, 40), changes, 32)
    print(hashlib.sha256(torch.stack(views).numpy().tobytes()).hexdigest())
    assert all(view.data_ptr() % 64 == 0 for view in views)
"""
    where = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    made = [
        subprocess.run([sys.executable, "-c", program], env=where, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    hashes = [[line for line in out.splitlines() if len(line) == 64] for out in made]
    assert "was compiled" in made[0]
    assert "was compiled" not in made[1]
    assert len(hashes[0]) == len(RECIPES)
    assert hashes[0] == hashes[1]
