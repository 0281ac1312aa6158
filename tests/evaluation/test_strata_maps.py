"""Where strata look, on maps and masks made by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import write_png

from icl_msr.core.records import Records
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.files import FileSplit
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.strata_maps import (
    Found,
    masks_of,
    measure,
    on_object,
    split_with_masks,
    strata_records,
    weighted_maps,
)
from icl_msr.models.backbones import Backbone
from icl_msr.report import words

BOOTSTRAP = Bootstrap(200, seed=0)
MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def squares(n: int = 40, size: int = 16) -> ArraySplit:
    """Red squares of several sizes and places on blue."""
    images, masks = torch.zeros(n, 3, size, size, dtype=torch.uint8), torch.zeros(n, size, size, dtype=torch.bool)
    for i in range(n):
        masks[i, i % 8 : i % 8 + 4 + i % 3, i % 5 : i % 5 + 6] = True
    images[:, 0], images[:, 2] = 255 * masks, 255 * ~masks
    return ArraySplit(images, torch.zeros(n, dtype=torch.long), masks)


class Colours(nn.Module):
    """Channel 0 fires on the object alone, channel 1 on the background alone, channel 2 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward_features(self, images: Tensor) -> Tensor:
        red, _, blue = self.norm(images).unbind(1)
        maps = torch.stack([red, blue, torch.ones_like(red)], 1)
        return F.avg_pool2d(maps, 2)


def found(strata: Tensor, split: Split | None = None, images: int = 1000, batch_size: int = 7) -> Found:
    """Strata (S, 3), the same for all images."""
    return measure(
        Backbone(Colours(), 3, ""),
        lambda shown: strata.expand(len(shown), -1, -1),
        split or squares(),
        mean=MEAN,
        std=STD,
        device="cpu",
        images=images,
        batch_size=batch_size,
    )


def by_stratum(records: Records) -> dict[str | int, dict[str, Any]]:
    """The records of each stratum by metric."""
    rows: dict[str | int, dict[str, Any]] = {}
    for record in records.where("strata"):
        rows.setdefault(record.told("stratum"), {})[record.metric] = record
    return rows


def test_a_share_is_a_sum_over_pixels() -> None:
    """Against a map that is enlarged to the image, pixel by pixel; 4 x 6 cells divide 8 x 12 pixels, 5 x 7 do not."""
    torch.manual_seed(0)
    masks = torch.rand(3, 8, 12) < 0.4
    for cells in ((4, 6), (5, 7), (8, 12), (1, 1), (10, 14)):
        maps = torch.rand(3, 2, *cells, dtype=torch.float64)
        fine = maps.repeat_interleave(840 // cells[0], 2).repeat_interleave(840 // cells[1], 3)
        enlarged = masks.repeat_interleave(840 // 8, 1).repeat_interleave(840 // 12, 2)
        expected = (fine * enlarged[:, None]).sum((2, 3)) / fine.sum((2, 3))
        torch.testing.assert_close(on_object(maps, masks), expected)


def test_a_flat_map_has_the_share_of_the_area_and_an_empty_one_none() -> None:
    masks = squares().masks
    assert masks is not None
    maps = torch.stack([torch.ones(40, 5, 5), torch.zeros(40, 5, 5)], 1)
    share = on_object(maps, masks)
    torch.testing.assert_close(share[:, 0], masks.float().mean((1, 2)))
    assert share[:, 1].isnan().all()


def test_negative_activations_are_cut_off_and_narrow_strata_shared() -> None:
    maps = torch.tensor([1.0, -5.0, 2.0, 3.0]).view(1, 4, 1, 1)
    strata = torch.tensor([[0.5, 1.0]])[None]
    assert float(weighted_maps(maps, strata)) == 0.5 * 1 + 0 + 0.5 * 2 + 1.0 * 3


def test_channels_that_fire_on_the_object_or_on_the_background() -> None:
    split = squares()
    assert split.masks is not None
    area = split.masks.float().mean((1, 2))
    shares, place, areas = found(torch.eye(3), split, batch_size=40)
    torch.testing.assert_close(areas, area)
    covered = F.avg_pool2d(split.masks.float()[:, None], 2)  # a cell that an edge cuts belongs to both sides
    for column, fires in ((1, covered), (2, 1 - covered)):
        expected = (fires * covered).sum((1, 2, 3)) / fires.sum((1, 2, 3))
        torch.testing.assert_close(shares[:, column], expected, rtol=1e-4, atol=1e-4)
    assert (shares[:, 2] < area).all()
    torch.testing.assert_close(shares[:, 3], area)
    torch.testing.assert_close(
        shares[:, 0], (area * (shares[:, 1] + 1) + (1 - area) * shares[:, 2]) / 2, rtol=1e-4, atol=1e-4
    )
    other = covered.roll(1, 0)
    expected = (covered * other).sum((1, 2, 3)) / covered.sum((1, 2, 3)) - area.roll(1)
    torch.testing.assert_close(place[:, 1], expected, rtol=1e-4, atol=1e-4)

    seen = strata_records(Found(shares, place, areas), "toys", BOOTSTRAP)
    rows = by_stratum(seen)
    assert list(rows) == ["all channels", 1, 2, 3]
    mean_area = seen.find("strata_area")
    assert mean_area is not None
    assert mean_area.value is not None
    for column, row in enumerate(rows.values()):
        assert row["share"].value == pytest.approx(float(shares[:, column].mean()))
        assert row["by_place"].value == pytest.approx(mean_area.value + float(place[:, column].mean()), abs=1e-6)
        assert row["excess"].value == pytest.approx(100 * (row["share"].value - row["by_place"].value), abs=1e-4)
        assert row["share"].low <= row["share"].value <= row["share"].high
    assert rows[2]["excess"].high < 0 < rows[1]["excess"].low
    assert rows[3]["excess"].value == pytest.approx(0, abs=1e-4)
    difference = seen.find("strata_apart")
    assert difference is not None
    assert [record.value for record in seen.where("strata_apart")[1:]] == [1, 2]  # more, less
    halves = shares[1::2]
    assert difference.value == pytest.approx(100 * float((halves[:, 1] - halves[:, 2]).mean()))
    assert "40 images of toys" in seen.layouts["strata"].about
    said = " ".join(words.strata(seen))
    assert "Stratum 2 has clearly less activation on the object than a map that does not see it" in said
    assert "; stratum 1 has clearly more" in said
    assert "They differ: stratum 1 has more of it on the object than stratum 2" in said


def test_a_map_that_sees_nothing_is_not_said_to_avoid_objects_where_it_is_faint() -> None:
    """Its left half is four times as bright as the right one, where the objects are."""
    torch.manual_seed(0)
    masks = torch.zeros(200, 8, 8, dtype=torch.bool)
    for mask in masks:
        row, column = torch.randint(0, 4, (2,)).tolist()
        mask[row : row + 4, 4 + column // 2 : 6 + column] = True
    maps = torch.ones(200, 1, 8, 8)
    maps[..., :4] = 4.0
    area = masks.float().mean((1, 2))
    shares = on_object(maps, masks).expand(-1, 2)
    place = on_object(maps, masks.roll(1, 0)).expand(-1, 2) - area.roll(1)[:, None]
    seen = strata_records(Found(shares, place, area), "toys", BOOTSTRAP)
    row = by_stratum(seen)[1]
    assert row["share"].value < 0.6 * float(area.mean())
    assert row["excess"].value == pytest.approx(0, abs=1e-4)
    assert words.strata(seen)[0].startswith("No stratum avoids the object")


def test_equal_strata_do_not_differ_and_one_stratum_has_none_to_differ_from() -> None:
    seen = strata_records(found(torch.ones(3, 3) / 3**0.5), "toys", BOOTSTRAP)
    difference = seen.find("strata_apart")
    assert difference is not None
    assert difference.value == 0
    first, *others = (row["share"].value for row in by_stratum(seen).values())
    assert others == [pytest.approx(first)] * 3
    said = words.strata(seen)
    assert "All strata look at about the same place" in said[1]
    alone = strata_records(found(torch.ones(1, 3) / 3**0.5), "toys", BOOTSTRAP)
    assert alone.find("strata_apart") is None
    assert len(words.strata(alone)) == 1


def test_the_largest_of_many_equal_differences_is_not_called_one() -> None:
    """40 strata that look at random: the two that differ most do so by chance, and not on other images."""
    torch.manual_seed(0)
    noise = 0.2 + 0.05 * torch.randn(300, 41)
    difference = strata_records(Found(noise, 0 * noise, torch.full((300,), 0.2)), "toys", BOOTSTRAP).find(
        "strata_apart"
    )
    assert difference is not None
    assert difference.value is not None
    assert difference.low is not None
    assert difference.low < 0.2
    spread = noise[:, 1:].mean(0)
    assert difference.value < 100 * float(spread.max() - spread.min()) / 2


def test_a_dead_stratum_is_left_out() -> None:
    strata = torch.stack([torch.ones(3), torch.zeros(3)])
    assert list(by_stratum(strata_records(found(strata), "toys", BOOTSTRAP))) == ["all channels", 1]


def test_the_images_are_spread_over_the_split_and_those_without_an_object_left_out() -> None:
    split = squares()
    assert split.masks is not None
    split.masks[0] = False
    shares, _, area = found(torch.eye(3), split, images=5)
    assert len(shares) == 4
    torch.testing.assert_close(area, split.masks[[10, 20, 29, 39]].float().mean((1, 2)), atol=0.05, rtol=0)


@pytest.mark.parametrize("batch_size", [13, 39, 1000])
def test_the_size_of_a_batch_changes_nothing_and_the_other_object_is_another(batch_size: int) -> None:
    shares, place, area = found(torch.eye(3), batch_size=batch_size)
    torch.testing.assert_close(shares, found(torch.eye(3)).shares)
    own = shares[:, 1] - area
    assert abs(float(place[-1, 1] - own[-1])) > 0.01


def test_the_backbone_is_left_as_it_was() -> None:
    backbone = Backbone(Colours(), 3, "").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    whole = {"mean": MEAN, "std": STD, "device": "cpu", "images": 8, "batch_size": 4}
    measure(backbone, lambda shown: torch.eye(3).expand(len(shown), 3, 3), squares(), **whole)  # type: ignore[arg-type]
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_masks_of_files_are_cut_as_the_images_are(tmp_path: Path) -> None:
    """12 x 8 pixels, of which the centre square is shown at 4 pixels."""
    image = torch.zeros(3, 8, 12, dtype=torch.uint8)
    image[:, 2:6, 4:8] = 255
    write_png(image, str(tmp_path / "a.png"))
    keys = {"files": [str(tmp_path / "a.png")], "labels": torch.tensor([0]), "image_size": 4}
    expected = torch.zeros(1, 4, 4, dtype=torch.bool)
    expected[0, 1:3, 1:3] = True
    with_box = FileSplit(**keys, boxes=torch.tensor([[4, 2, 8, 6]]))  # type: ignore[arg-type]
    with_mask = FileSplit(**keys, mask_files=[str(tmp_path / "a.png")])  # type: ignore[arg-type]
    for split in (with_box, with_mask, with_box.in_memory()):
        masks = masks_of(split, torch.tensor([0]))
        assert masks is not None
        assert torch.equal(masks, expected)
        assert torch.equal(masks[0], split.load(torch.tensor([0]))[0, 0] > 127)
    cut = FileSplit(**keys, boxes=torch.tensor([[4, 2, 8, 6]]), region="fg")  # type: ignore[arg-type]
    assert masks_of(cut, torch.tensor([0])) is None
    assert masks_of(FileSplit(**keys), torch.tensor([0])) is None  # type: ignore[arg-type]


def test_the_first_split_with_masks_is_chosen() -> None:
    plain = ArraySplit(squares().images, squares().labels)
    dataset = Dataset("toys", ["a"], 16, plain, {"only_bg": plain, "original": squares(), "mixed_rand": squares()})
    assert split_with_masks(dataset) == "original"
    assert split_with_masks(Dataset("toys", ["a"], 16, plain, {"test": plain})) is None
