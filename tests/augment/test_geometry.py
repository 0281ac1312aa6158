import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F

from icl_msr.augment import geometry, resize
from icl_msr.core.randomness import keys, uniforms


def pictures(n, height, width):
    return (
        (uniforms(keys(1, 0, torch.arange(n), 0), 3 * height * width) * 256).to(torch.uint8).view(n, 3, height, width)
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (96, 80, 32), (40, 64, 56)])
def test_crop_is_torchvisions(height, width, size, interpolation):
    images = pictures(20, height, width)
    u = uniforms(keys(2, 0, torch.arange(20), 0), 23)
    boxes = geometry.random_boxes(u[:, :22], height, width, [0.05, 1.0], [0.75, 4 / 3])
    flip = u[:, 22] < 0.5
    assert flip.any()
    assert not flip.all()
    top, left, rows, columns = boxes.unbind(1)
    down = geometry.resampling(top, rows, height, size, None, interpolation)
    across = geometry.resampling(left, columns, width, size, flip, interpolation)
    ours = geometry.separable(images, down, across)
    for image, box, mirrored, view in zip(images, boxes.tolist(), flip, ours, strict=True):
        filter_ = T.InterpolationMode(interpolation)
        reference = F.resized_crop(image.float(), *box, [size, size], filter_, antialias=True)
        reference = reference.flip(-1) if mirrored else reference
        torch.testing.assert_close(view, reference, atol=2e-3, rtol=0)  # of 255


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_cpu_cuts_large_views_as_the_matrices_do(interpolation, monkeypatch):
    images = pictures(6, 150, 130)
    u = uniforms(keys(2, 0, torch.arange(6), 0), 23)
    boxes, flip = geometry.random_boxes(u[:, :22], 150, 130, [0.05, 1.0], [0.75, 4 / 3]), u[:, 22] < 0.5
    ours = geometry.crop(images, boxes, 112, flip, interpolation)
    monkeypatch.setattr(geometry, "_LARGE", 1000)
    slow = geometry.crop(images, boxes, 112, flip, interpolation)
    assert flip.any()
    torch.testing.assert_close(ours, slow, atol=5e-3, rtol=0)  # of 255


@pytest.mark.parametrize(("height", "width"), [(32, 32), (100, 60), (10, 100)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    n, scale, ratio = 4000, [0.2, 1.0], [0.75, 4 / 3]
    u = uniforms(keys(3, 0, torch.arange(n), 0), 22)
    ours = geometry.random_boxes(u, height, width, scale, ratio)
    top, left, h, w = ours.unbind(1)
    assert (ours[:, 2:] > 0).all()
    assert (ours[:, :2] >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    crop = T.RandomResizedCrop(8, scale=scale, ratio=ratio)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros(3, height, width)
        drawn = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    # Columns, areas and aspect ratios; the Kolmogorov-Smirnov distance is exceeded by chance once in 10,000 times.
    for a, b in [
        *zip(ours.T, theirs.T, strict=True),
        (h * w, theirs[:, 2] * theirs[:, 3]),
        (w / h, theirs[:, 3] / theirs[:, 2]),
    ]:
        grid = torch.cat([a, b]).unique()
        below = [torch.searchsorted(x.sort().values, grid, right=True) / n for x in (a, b)]
        assert (below[0] - below[1]).abs().max() < 2.23 * (2 / n) ** 0.5


def test_boxes_of_a_batch_of_sizes():
    u = uniforms(keys(3, 0, torch.arange(2), 0), 22)
    height, width = torch.tensor([400, 90]), torch.tensor([500, 70])
    both = geometry.random_boxes(u, height, width, [0.08, 1.0], [0.75, 4 / 3])
    for i in range(2):
        one = geometry.random_boxes(u[i : i + 1], int(height[i]), int(width[i]), [0.08, 1.0], [0.75, 4 / 3])
        assert torch.equal(one[0], both[i])


def test_fallback_is_the_central_box():
    u = uniforms(keys(3, 0, torch.arange(4), 0), 22)
    wide = geometry.random_boxes(u, 12, 120, [1.0, 1.0], [0.75, 4 / 3])
    assert torch.equal(wide, torch.tensor([[0, 52, 12, 16]]).expand(4, 4))
    tall = geometry.random_boxes(u, 120, 12, [1.0, 1.0], [0.75, 4 / 3])
    assert torch.equal(tall, torch.tensor([[52, 0, 16, 12]]).expand(4, 4))


def test_blur_is_torchvisions():
    images = pictures(4, 40, 40).float() / 255
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    matrix = geometry.blurring(sigma, 40)
    ours = geometry.separable(images, matrix, matrix)
    for image, s, view in zip(images, sigma.tolist(), ours, strict=True):
        torch.testing.assert_close(view, F.gaussian_blur(image, [25, 25], [s, s]), atol=1e-5, rtol=0)
    assert torch.equal(geometry.blurring(torch.zeros(1), 9)[0], torch.eye(9))


def test_resize():
    images = pictures(2, 48, 64)
    assert torch.equal(resize(images, 32), F.resize(images, [32, 32], antialias=True))
    assert resize(images[..., :48], 48).dtype == torch.uint8
