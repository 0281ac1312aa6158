"""Splits made of another split."""

import pytest
import torch

from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.cache import split_identity
from icl_msr.evaluation.subsets import Some, crops

CPU = torch.device("cpu")


def test_some_images_are_those(dataset: Dataset) -> None:
    whole, index = dataset.tests["original"], torch.tensor([7, 3, 150])
    some = Some(whole, index)
    assert len(some) == 3
    assert torch.equal(some.labels, whole.labels[index])
    assert torch.equal(some.load(torch.tensor([2, 0])), whole.load(torch.tensor([150, 7])))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_crops_do_not_depend_on_the_batch(dataset: Dataset, batch_size: int) -> None:
    cropped = crops(dataset.tests["original"], 0, 3, CPU)
    index = torch.arange(12)
    parts = torch.cat([cropped.load(part) for part in index.split(batch_size)])
    assert torch.equal(parts, cropped.load(index))


def test_crops_show_parts_of_their_image(dataset: Dataset) -> None:
    """A picture of its own coordinates says where a crop comes from."""
    across = torch.linspace(0, 255, 32).round().byte().expand(32, 32)
    split = dataset.tests["original"]
    places = Some(split, torch.arange(200))
    places.load = lambda index: torch.stack([across, across.T, across]).expand(len(index), 3, 32, 32)  # type: ignore[method-assign]
    views = [crops(places, view, 0, CPU).load(torch.arange(200)).float() for view in (0, 1)]
    assert views[0].shape == (200, 3, 32, 32)
    assert not (views[0] == views[1]).flatten(1).all(1).any()
    for view in views:
        mirrored = view[:, 0, 16, -1] < view[:, 0, 16, 0]
        assert 70 < mirrored.sum() < 130
        assert (view[:, 1, -1, 16] > view[:, 1, 0, 16]).all()
        width, height = (view[:, 0, 16, -1] - view[:, 0, 16, 0]).abs(), view[:, 1, -1, 16] - view[:, 1, 0, 16]
        area = (width / 255) * (height / 255)
        assert 0.15 < area.min() < 0.35
        assert area.max() > 0.8


def test_identities_tell_splits_apart(dataset: Dataset) -> None:
    whole = dataset.tests["original"]
    made = [Some(whole, torch.tensor([1])), Some(whole, torch.tensor([2]))]
    made += [crops(whole, view, seed, CPU) for view in (0, 1) for seed in (0, 1)]  # type: ignore[misc]
    identities = {split_identity(split) for split in (whole, *made)}
    assert None not in identities
    assert len(identities) == 7
