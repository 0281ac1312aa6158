import torch
import torch.nn.functional as F
from torch import Tensor

from icl_msr.data.crops import boxes_around, crop_to_boxes, moved, square_boxes


def images(n: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_boxes_enclose_the_mask() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2:5, 1:4] = True
    masks[0, 5, 7] = True
    assert boxes_around(masks).tolist() == [[1, 2, 8, 6], [0, 0, 8, 6]]  # an empty mask: the whole image


def test_squares_stay_inside_and_keep_the_box() -> None:
    boxes = torch.tensor([[0, 2, 3, 10], [4, 4, 6, 6], [9, 0, 12, 1], [0, 0, 12, 4]])
    squares = square_boxes(boxes, 12)
    assert squares.tolist() == [[0, 2, 8, 10], [4, 4, 6, 6], [9, 0, 12, 3], [0, 0, 12, 12]]


def test_crop_agrees_with_interpolate() -> None:
    batch = images(4, 24, 40)
    boxes = torch.tensor([[0, 0, 40, 24], [3, 5, 11, 9], [10, 2, 39, 23], [7, 7, 8, 8]])
    crops = crop_to_boxes(batch, boxes, 16)
    for image, (x0, y0, x1, y1), crop in zip(batch, boxes.tolist(), crops, strict=True):
        cut = image[None, :, y0:y1, x0:x1].double()
        expected = F.interpolate(cut, (16, 16), mode="bilinear", antialias=True)[0]
        assert (crop.double() - expected).abs().max() <= 0.75  # half a grey level of rounding, and the filter's steps


def test_crop_of_its_own_size_is_the_cut_itself() -> None:
    batch = images(3, 20, 20)
    boxes = torch.tensor([[0, 0, 8, 8], [5, 12, 13, 20], [1, 2, 9, 10]])
    crops = crop_to_boxes(batch, boxes, 8)
    for image, (x0, y0, x1, y1), crop in zip(batch, boxes.tolist(), crops, strict=True):
        assert torch.equal(crop, image[:, y0:y1, x0:x1])


def test_moved_boxes_keep_their_size_and_go_everywhere() -> None:
    boxes = torch.tensor([[1, 2, 4, 4]]).repeat(4000, 1)
    found = moved(boxes, 5, 6, torch.arange(4000))
    assert torch.equal(found[:, 2:] - found[:, :2], boxes[:, 2:] - boxes[:, :2])
    places, counts = found[:, :2].unique(dim=0, return_counts=True)
    assert len(places) == 4 * 4  # of 6 - 3 + 1 columns and 5 - 2 + 1 rows
    assert counts.min() > 180
    assert torch.equal(moved(boxes[:1], 5, 6, torch.tensor([7])), found[7:8])
    whole = torch.tensor([[0, 0, 6, 5]])
    assert torch.equal(moved(whole, 5, 6, torch.tensor([3])), whole)
