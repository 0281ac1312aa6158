"""Objects on other backgrounds, against loops over pixels."""

import pytest
import torch

from icl_msr.augment import Background
from icl_msr.augment.background import cleared, widest
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys, uniforms

SIZE = 16


def background(**changes):
    plain = {"fill": "image", "weight": [1.0, 1.0], "probability": 1.0, "softness": 0.0, "views": [1]}
    return Background(**plain | changes)


def scenes(n, seed=0):
    """Return images, masks of squares of several sizes and places, boxes around them, and keys."""
    key = keys(seed, 0, torch.arange(n), 0)
    images = (uniforms(key, 3 * SIZE * SIZE) * 256).to(torch.uint8).view(n, 3, SIZE, SIZE)
    low = (uniforms(key, 2, first=9000) * 6).long()
    boxes = torch.cat([low, low + 3 + (uniforms(key, 2, first=9002) * 6).long()], 1)
    masks = torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return images, masks, boxes, key


def slowly_cleared(image, box, everywhere=False):
    """Repeat the widest strip pixel by pixel."""
    x0, y0, x1, y1 = box
    strips = [("x", 0, x0), ("x", x1, SIZE - x1), ("y", 0, y0), ("y", y1, SIZE - y1)]
    axis, start, width = max(strips, key=lambda strip: strip[2])
    result = image.clone()
    for y in range(SIZE):
        for x in range(SIZE):
            if width and (everywhere or (x0 <= x < x1 and y0 <= y < y1)):
                if axis == "x":
                    result[:, y, x] = image[:, y, start + (x - x0) % width]
                else:
                    result[:, y, x] = image[:, start + (y - y0) % width, x]
    return result


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_background_without_its_object_is_that_of_a_loop(everywhere):
    images, _, boxes, _ = scenes(12)
    boxes[0] = torch.tensor([0, 0, SIZE, SIZE])
    boxes[1] = torch.tensor([0, 3, SIZE, 9])
    for image, box, found in zip(images, boxes.tolist(), cleared(images, boxes, everywhere=everywhere), strict=True):
        assert torch.equal(found, slowly_cleared(image, box, everywhere))
    assert widest(boxes, SIZE)[:2].tolist() == [0, 7]


@pytest.mark.parametrize("fill", ["image", "tiles"])
def test_a_swap_is_that_of_a_loop(fill):
    images, masks, boxes, key = scenes(8)
    others, behind = images.flip(0), boxes.flip(0)
    found = background(fill=fill)(images, masks, others, behind, key)
    for i, image in enumerate(images):
        x0, y0, x1, y1 = behind[i].tolist()
        wider = (max(x0 - 1, 0), max(y0 - 1, 0), min(x1 + 1, SIZE), min(y1 + 1, SIZE))
        new = slowly_cleared(others[i], wider, everywhere=fill == "tiles")
        for y in range(SIZE):
            for x in range(SIZE):
                expected = image if masks[i, y, x] else new
                assert torch.equal(found[i, :, y, x], expected[:, y, x].float())


@pytest.mark.parametrize("fill", ["image", "tiles", "noise", "colour"])
def test_the_object_stays_and_an_image_does_not_depend_on_its_batch(fill):
    images, masks, boxes, key = scenes(8)
    others, behind = images.flip(0), boxes.flip(0)
    change = background(fill=fill, weight=[0.2, 0.9], probability=0.7, softness=1.0)
    found = change(images, masks, others, behind, key)
    inside = masks[:, None].expand_as(images)
    assert torch.equal(found[inside], images[inside].float())
    assert found.amin() >= 0
    assert found.amax() <= 255
    for i in range(8):
        alone = change(*(part[i : i + 1] for part in (images, masks, others, behind, key)))
        torch.testing.assert_close(alone[0], found[i])


def test_weight_and_probability_are_those_of_the_keys():
    images, masks, boxes, key = scenes(400)
    black, whole = torch.zeros_like(images), torch.full_like(images, 255)
    found = background(weight=[0.25, 0.75], probability=0.5)(black, masks, whole, boxes, key)
    weights = torch.stack([values[:, ~mask].mean() / 255 for values, mask in zip(found, masks, strict=True)])
    changed = weights > 0
    assert 0.4 < changed.float().mean() < 0.6
    assert weights[changed].min() >= 0.25
    assert weights[changed].max() <= 0.75
    assert weights[changed].std() > 0.1
    assert torch.equal(background(probability=0.0)(images, masks, whole, boxes, key), images.float())


def test_an_edge_is_soft_outside_the_object_alone():
    images, masks, boxes, key = scenes(8)
    black, white = torch.zeros_like(images), torch.full_like(images, 255)
    sharp, soft = (background(softness=s)(black, masks, white, boxes, key)[:, 0] for s in (0.0, 1.0))
    assert set(sharp.unique().tolist()) == {0.0, 255.0}
    assert (soft <= sharp).all()
    assert (soft[masks] == 0).all()
    beside = (boxes[:, 2] < SIZE).nonzero()[0, 0]
    row, column = int(boxes[beside, 1]) + 1, int(boxes[beside, 2])
    line = soft[beside, row, column:]
    assert 50 < line[0] < 200
    assert (line.diff() >= -1e-3).all()


def test_a_donor_is_another_image_that_may_give_its_background():
    able, index = torch.tensor([2, 5, 7, 11]), torch.arange(12).repeat(500)
    key = keys(0, 0, torch.arange(len(index)), 1)
    donors = background().donors(able, index, key)
    assert set(donors.tolist()) == set(able.tolist())
    assert not (donors == index).any()
    shares = torch.bincount(donors[index == 0], minlength=12)[able] / 500
    assert (shares - 0.25).abs().max() < 0.08
    assert torch.equal(background().donors(able, index[40:60], key[40:60]), donors[40:60])


def test_views_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"names the view 2, .* lists 2; type background.views=\[1\]"):
        background(views=[0, 2]).require(2)
