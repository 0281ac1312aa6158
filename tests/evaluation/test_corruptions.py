"""Against SciPy, Pillow and slow derivations of what the paper's code does, one image at a time."""

import io
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

from icl_msr.core.randomness import keys
from icl_msr.evaluation import corruptions as c
from icl_msr.evaluation.corruptions import CORRUPTIONS, LEVELS, Corruption, Draw, corrupt

SIZES = (32, 64)


def photographs(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth colours with edges and some noise, uint8 (N, 3, S, S)."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(count, 3, size, size)), (0, 0, size / 10, size / 10))
    smooth = noise / noise.std() * 50 + 120
    smooth[:, :, size // 3 : size // 2, size // 4 : size // 2] += rng.uniform(-90, 90, (count, 3, 1, 1))
    return torch.from_numpy((smooth + rng.normal(size=smooth.shape) * 4).clip(0, 255).astype(np.uint8))


def draw(count: int = 4, seed: int = 0) -> Draw:
    return Draw(keys(seed, 1, torch.arange(count), view=-100))


def changed(corruption: Corruption, severity: int, images: Tensor) -> float:
    """Mean absolute difference, in levels."""
    out = corrupt(images, corruption, severity, seed=0, index=torch.arange(len(images)))
    return (out.double() - images.double()).abs().mean().item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_keeps_shape_and_type_and_grows(corruption: Corruption, size: int) -> None:
    images = photographs(6, size)
    out = corrupt(images, corruption, 3, seed=0, index=torch.arange(6))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    weak, strong = changed(corruption, 1, images), changed(corruption, 5, images)
    assert weak > 0.05
    # The published strengths of these do not rise in this measure.
    assert strong > weak or corruption in ("elastic_transform", "glass_blur", "snow")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_depends_on_seed_image_and_severity_alone(corruption: Corruption) -> None:
    images, index = photographs(5, 32), torch.tensor([3, 9, 1, 7, 1000])
    whole = corrupt(images, corruption, 2, seed=1, index=index)
    parts = [corrupt(images[i : i + 1], corruption, 2, seed=1, index=index[i : i + 1]) for i in range(5)]
    assert (whole.int() - torch.cat(parts).int()).abs().max() <= 1  # products of matrices round by their shape
    same = images[:1].repeat(2, 1, 1, 1)
    twins = corrupt(same, corruption, 2, seed=1, index=torch.tensor([4, 5]))
    still = corruption in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(twins[0], twins[1]) == still


def test_strengths_by_size() -> None:
    assert [c.published_size(size) for size in (28, 32, 45, 46, 64, 96, 119, 128, 224, 448)] == [
        *(32, 32, 32, 64, 64, 64, 64, 224, 224, 224)
    ]
    for levels in LEVELS.values():
        assert set(levels) == set(CORRUPTIONS)
        assert all(len(levels[name]) == 5 for name in CORRUPTIONS)
    assert len(CORRUPTIONS) + len(c.LEFT_OUT) == 15


def test_large_images() -> None:
    images = photographs(1, 224)
    for corruption in CORRUPTIONS:
        assert corrupt(images, corruption, 5, seed=0, index=torch.tensor([0])).shape == images.shape


def test_gaussian_noise_is_normal() -> None:
    noise = c.gaussian_noise(torch.full((8, 3, 32, 32), 0.5), 0.04, draw(8)) - 0.5
    assert stats.kstest(noise.flatten().double().numpy() / 0.04, "norm").pvalue > 0.01


@pytest.mark.parametrize("photons", [3, 60, 500])
def test_shot_noise_is_poisson(photons: int) -> None:
    level = 102
    x = torch.full((8, 3, 32, 32), level / 255)
    counts = (c.shot_noise(x, photons, draw(8)) * photons).round().flatten().double().numpy()
    rate = photons * level / 255
    edges = np.unique(stats.poisson(rate).ppf([0, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 1 - 1e-12]).clip(0))
    found = np.histogram(counts, [*(edges - 0.5), np.inf])[0]
    below = stats.poisson(rate).cdf([*(edges - 1), np.inf])
    expected = np.diff(below) * len(counts)
    keep = expected > 5
    assert stats.chisquare(found[keep], expected[keep] / expected[keep].sum() * found[keep].sum()).pvalue > 0.01
    dark = c.shot_noise(torch.zeros(2, 3, 8, 8), photons, draw(2))
    assert (dark == 0).all()


def test_impulse_noise_shares() -> None:
    out = c.impulse_noise(torch.full((16, 3, 32, 32), 0.5), 0.1, draw(16))
    n = out.numel()
    for value in (0.0, 1.0):
        assert stats.binomtest(int((out == value).sum()), n, 0.05).pvalue > 0.01


@pytest.mark.parametrize(("radius", "sigma"), [(0.3, 0.4), (1.5, 0.1), (3, 0.1), (10, 0.5)])
def test_defocus_equals_scipy(radius: float, sigma: float) -> None:
    reach = 8 if radius <= 8 else radius
    x, y = np.meshgrid(*[np.arange(-reach, reach + 1)] * 2)
    kernel = (x**2 + y**2 <= radius**2).astype(float)
    kernel /= kernel.sum()
    taps = 1 if radius <= 8 else 2
    kernel = ndimage.gaussian_filter(kernel, sigma, radius=taps, mode="mirror")
    image = photographs(1, 32).double().numpy()[0] / 255
    expected = np.stack([ndimage.correlate(channel, kernel, mode="mirror") for channel in image])
    out = c.defocus_blur(torch.from_numpy(image)[None].float(), (radius, sigma), draw(1))[0]
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


def turns(size: int, reach: int) -> Iterator[tuple[int, int]]:
    for row in range(size - reach, reach, -1):
        for column in range(size - reach, reach, -1):
            yield row, column


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_moves_pixels_as_one_after_the_other(reach: int) -> None:
    size = 20
    offsets = torch.randint(-reach, reach, (3, 2, size, size), generator=torch.Generator().manual_seed(reach))
    sources = c.pushed(offsets, reach)
    for image, source in zip(offsets, sources, strict=True):
        values = np.arange(size**2).reshape(size, size)
        for row, column in turns(size, reach):
            down, across = image[:, row, column].tolist()
            values[row, column] = values[row + down, column + across]
        assert (values == source.numpy()).all()


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9, 1.5])
def test_glass_blurs_as_scipy(sigma: float) -> None:
    image = torch.rand(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blur = c._gaussian(32, sigma, "nearest", 4.0).double()
    expected = ndimage.gaussian_filter(image.numpy(), sigma, mode="nearest", truncate=4.0)
    np.testing.assert_allclose((blur @ image @ blur.T).numpy(), expected, atol=1e-6)


def test_motion_blur_leaves_a_trail() -> None:
    x = torch.zeros(3, 1, 21, 21)
    x[:, :, 10, 10] = 1
    angles = torch.tensor([[0.0], [math.pi / 4], [-math.pi / 2]])
    out = c.trail(x, 3, 2.0, angles)
    weights = torch.exp(-(torch.arange(7) ** 2) / 8.0)
    weights /= weights.sum()
    for tap, _weight in enumerate(weights):
        for image, angle in zip(out[:, 0], angles[:, 0], strict=True):
            row, column = (round(tap * f(angle.item())) for f in (math.sin, math.cos))
            assert image[10 - row, 10 - column] == pytest.approx(
                sum(w.item() for t, w in enumerate(weights)
                    if (round(t * math.sin(angle)), round(t * math.cos(angle))) == (row, column))
            )  # fmt: skip
    assert out.sum((1, 2, 3)).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("factor", [1.0, 1.03, 1.26, 2.25, 4.5])
@pytest.mark.parametrize("size", [32, 64])
def test_zoom_equals_scipy(factor: float, size: int) -> None:
    image = photographs(1, size)[0].double().numpy()
    crop = int(np.ceil(size / factor))
    low = (size - crop) // 2
    large = ndimage.zoom(image[:, low : low + crop, low : low + crop], (1, factor, factor), order=1)
    trim = (large.shape[1] - size) // 2
    expected = large[:, trim : trim + size, trim : trim + size]
    np.testing.assert_allclose(c.zoomed(torch.from_numpy(image)[None], factor)[0].numpy(), expected, atol=1e-3)


def test_zoom_blur_is_the_mean_over_the_published_factors() -> None:
    x = photographs(1, 32).float() / 255
    factors = np.arange(1, 1.06, 0.01)
    assert len(factors) == 7  # 1.06 too, by rounding
    expected = (x + sum(c.zoomed(x, float(f)) for f in factors)) / 8
    torch.testing.assert_close(c.zoom_blur(x, LEVELS[32]["zoom_blur"][0], draw(1)), expected)


def test_plasma_is_the_diamond_square_algorithm() -> None:
    """Point by point, with the same random numbers."""
    size, decay = 8, 1.7
    smooth = c.plasma(size, decay, draw(1, seed=5))[0]
    numbers = draw(1, seed=5)
    numbers.uniform(1, 1)
    height: dict[tuple[int, int], float] = {(0, 0): 0.0}
    step, roughness = size, 1.0
    while step >= 2:
        half, n = step // 2, size // step
        noise = (numbers.uniform(3, n, n)[0].double() * 2 - 1) * roughness

        def around(row: int, column: int, steps: list[tuple[int, int]], half: int = half) -> float:
            return sum(height[(row + i * half) % size, (column + j * half) % size] for i, j in steps) / 4

        diagonal, straight = [(-1, -1), (-1, 1), (1, -1), (1, 1)], [(-1, 0), (1, 0), (0, -1), (0, 1)]
        for kind, (down, across), steps in (
            (0, (half, half), diagonal),
            (1, (0, half), straight),
            (2, (half, 0), straight),
        ):
            for i in range(n):
                for j in range(n):
                    at = (i * step + down, j * step + across)
                    height[at] = around(*at, steps) + noise[kind, i, j].item()
        step, roughness = half, roughness / decay**2
    expected = np.array([[height[i, j] for j in range(size)] for i in range(size)])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(smooth.numpy(), expected, atol=1e-5)


def test_brightness_is_value_in_hsv() -> None:
    import colorsys

    x = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = 0
    out = c.brightness(x, 0.2, draw(1))
    for i in range(6):
        for j in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
            assert out[0, :, i, j].tolist() == pytest.approx(expected, abs=1e-5)


def test_contrast() -> None:
    image = photographs(1, 32)
    x = image.double().numpy()[0] / 255
    mean = x.mean((1, 2), keepdims=True)
    expected = ((x - mean) * 0.4 + mean).clip(0, 1) * 255
    out = corrupt(image, "contrast", 3, seed=0, index=torch.tensor([0]))[0]
    assert np.abs(out.numpy() - expected).max() <= 0.51


@pytest.mark.parametrize(("strength", "sigma"), [(1.6, 6.4), (3.2, 1.3), (488.0, 170.8)])
def test_elastic_field_equals_scipy(strength: float, sigma: float) -> None:
    size = 32
    noise = np.random.default_rng(0).uniform(-1, 1, (2, size, size))
    smooth = c._gaussian(size, sigma, "reflect", 3.0).double().numpy()
    field = smooth @ noise @ smooth.T * strength
    expected = np.stack([ndimage.gaussian_filter(n, sigma, mode="reflect", truncate=3) for n in noise]) * strength
    np.testing.assert_allclose(field, expected, atol=1e-4 * strength)
    image = photographs(1, size)[0].double().numpy()
    rows, columns = np.mgrid[:size, :size] + expected
    places = np.stack([rows, columns])
    warped = np.stack([ndimage.map_coordinates(channel, places, order=1, mode="reflect") for channel in image])
    ours = c._bilinear(torch.from_numpy(image)[None], *(torch.from_numpy(p)[None] for p in places), c._reflect)[0]
    np.testing.assert_allclose(ours.numpy(), warped, atol=1e-3)


def test_elastic_affine_map_takes_the_corners_where_they_belong() -> None:
    """Level 1 of 32 pixels is the affine map alone: three marks come to lie where the jitter put them."""
    size, jitter = 32, 0.08 * 32
    corners = np.array([[26, 26], [26, 6], [6, 6]])  # 16 +- 10
    x = torch.zeros(1, 1, size, size)
    for across, down in corners:
        x[0, 0, down, across] = 1
    out = c.elastic_transform(x, LEVELS[32]["elastic_transform"][0], draw(1, seed=3))[0, 0].double().numpy()
    moved = corners + (draw(1, seed=3).uniform(3, 2)[0].double().numpy() * 2 - 1) * jitter
    rows, columns = np.mgrid[:size, :size]
    for across, down in moved:
        near = (np.abs(rows - down) < 3) & (np.abs(columns - across) < 3)
        weight = out * near
        assert weight.sum() > 0.5
        assert (weight * rows).sum() / weight.sum() == pytest.approx(down, abs=0.3)
        assert (weight * columns).sum() / weight.sum() == pytest.approx(across, abs=0.3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_pixelate_equals_pillow(size: int, severity: int) -> None:
    images = photographs(3, size)
    small = int(size * LEVELS[size]["pixelate"][severity - 1])
    out = corrupt(images, "pixelate", severity, seed=0, index=torch.arange(3))
    for image, ours in zip(images, out, strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillow = pillow.resize((small, small), Image.Resampling.BOX).resize((size, size), Image.Resampling.BOX)
        assert (np.asarray(pillow) == ours.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("size", [32, 40, 64])
@pytest.mark.parametrize("quality", [80, 50, 25, 7])
def test_jpeg_is_near_to_pillow(size: int, quality: int) -> None:
    """Most values are equal; a coefficient near a half that is rounded the other way moves those of its block."""
    images = photographs(6, size)
    ours = (c.jpeg_compression(images.float() / 255, quality, draw(6)) * 255).round().clamp(0, 255).double()
    theirs = torch.zeros_like(ours)
    for image, their in zip(images, theirs, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        their += torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert (ours - theirs).abs().median() <= 1
    between, lost = ((a - theirs).square().mean().sqrt() for a in (ours, images.double()))
    assert between < 0.25 * lost
