"""The report's grids show what they say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.io import decode_image

from icl_msr.core.views import NonSemantic, Views
from icl_msr.data.dataset import ArraySplit, Dataset, normalise
from icl_msr.evaluation import pictures
from icl_msr.models.backbones import Backbone

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def random_images(n: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is drawn, instead of a file."""
    drawn: dict[str, Any] = {}

    def draw(rows: Mapping[str, Any], path: Path, marks: Any = None) -> None:
        drawn.update(rows=rows, marks=marks)

    monkeypatch.setattr(pictures, "_grid", draw)
    return drawn


def make_views(n: int, negatives: int = 0) -> Views:
    whole, first, second = (normalise(random_images(n, seed), MEAN, STD) for seed in range(3))
    rows = normalise(random_images(n * negatives, 3), MEAN, STD).view(n, negatives, 3, 8, 8)
    non_semantic = NonSemantic(rows, 2.0, 0.25) if negatives else None
    return Views(whole, [first, second], torch.arange(n), torch.zeros(n, dtype=torch.long), non_semantic)


def test_pixels_undo_the_normalisation() -> None:
    images = random_images(4)
    assert torch.equal(pictures.pixels(normalise(images, MEAN, STD), MEAN, STD), images)
    assert torch.equal(
        pictures.pixels(normalise(images, MEAN, STD).bfloat16() * 9, MEAN, STD).max(), torch.tensor(255).byte()
    )


def test_views(grid: dict[str, Any], tmp_path: Path) -> None:
    pictures.views_grid(make_views(12), MEAN, STD, tmp_path / "views.png")
    assert list(grid["rows"]) == ["image X", "view 1", "view 2"]
    for seed, row in enumerate(grid["rows"].values()):
        assert torch.equal(row, random_images(12, seed)[:10])


def test_negatives(grid: dict[str, Any], tmp_path: Path) -> None:
    views = make_views(4, negatives=2)
    pictures.negatives_grid(views, MEAN, STD, tmp_path / "negatives.png")
    assert list(grid["rows"]) == ["query", "negative 1", "negative 2"]
    assert torch.equal(grid["rows"]["query"], random_images(4, 1))
    assert torch.equal(grid["rows"]["negative 2"], random_images(8, 3).view(4, 2, 3, 8, 8)[:, 1])


def test_strata_weigh_the_last_map(grid: dict[str, Any], tmp_path: Path) -> None:
    """A backbone whose map is the image itself, and strata of one channel each."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward_features(self, images: Tensor) -> Tensor:
            maps: Tensor = self.norm(images)
            return maps

    backbone = Backbone(Net(), 3, "")
    images = torch.rand(2, 3, 8, 8)
    images[:, 2] = 0
    statistics = [buffer.clone() for buffer in backbone.buffers()]
    strata = torch.eye(3).expand(2, 3, 3)
    pictures.strata_grid(backbone, strata, images, MEAN, STD, tmp_path / "strata.png")
    rows = grid["rows"]
    assert list(rows) == ["image X", "all channels", "stratum 1", "stratum 2", "stratum 3"]
    together = images.sum(1)
    _, alike = rows["all channels"]
    torch.testing.assert_close(alike, together / together.amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-4)
    shown, first = rows["stratum 1"]
    assert torch.equal(shown, pictures.pixels(images, MEAN, STD))
    torch.testing.assert_close(first, images[:, 0] / images[:, 0].amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-4)
    assert float(rows["stratum 3"][1].abs().max()) == 0  # nothing there, and no division by it
    assert backbone.training
    assert all(torch.equal(a, b) for a, b in zip(statistics, backbone.buffers(), strict=True))

    # One channel wide, they are shared by three encoders of one channel each.
    pictures.strata_grid(backbone, torch.ones(2, 1, 1), images, MEAN, STD, tmp_path / "strata.png")
    total = images.sum(1)
    _, shared = grid["rows"]["stratum 1"]
    torch.testing.assert_close(shared, total / total.amax((1, 2), keepdim=True), rtol=1e-4, atol=1e-4)


def test_the_weights_are_drawn_by_the_stratum_that_weighs_them_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two strata of three channels each, in any order, show as two blocks."""
    figures: list[Figure] = []

    def keep(self: Figure, path: Any, **_: Any) -> None:
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    owner = torch.tensor([1, 0, 1, 0, 0, 1])
    one = torch.stack([owner == 0, owner == 1]) * torch.tensor([1.0, 3.0, 2.0, 2.0, 1.0, 3.0])
    strata = torch.nn.functional.normalize(one, dim=1).expand(4, 2, 6)
    pictures.weights_figure(strata, tmp_path / "weights.png")
    histogram, heat = figures[0].axes[:2]
    shown = torch.tensor(heat.images[0].get_array().data)
    assert torch.equal(shown > 0, torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).bool())
    assert (shown[0, :3].diff() <= 0).all()
    assert (shown[1, 3:].diff() <= 0).all()
    torch.testing.assert_close(shown.square().sum(1), torch.full((2,), 6.0))  # sqrt(c) a_t
    for bars in histogram.patches:
        assert float(bars.get_data().values.sum()) == pytest.approx(100)
    assert [text.get_text() for text in histogram.get_legend().get_texts()] == ["stratum 1", "stratum 2"]


def test_neighbours(grid: dict[str, Any], tmp_path: Path) -> None:
    train, test = random_images(6), random_images(3, 1)
    dataset = Dataset(
        "toys",
        ["a", "b"],
        8,
        ArraySplit(train, torch.tensor([0, 0, 0, 1, 1, 1])),
        {"mixed_rand": ArraySplit(test, torch.tensor([0, 1, 1]))},
    )
    turn = torch.tensor([0.0, 0.1, 0.25, 1.0, 1.2, 1.4])
    towards = torch.tensor([0.0, 1.05, 0.2])
    circle = {"train": turn, "mixed_rand": towards}
    features = {name: torch.stack([angle.cos(), angle.sin()], 1) for name, angle in circle.items()}
    features["train"] *= torch.linspace(9, 1, 6)[:, None]  # directions count, lengths do not
    pictures.neighbours_grid(dataset, features, "mixed_rand", tmp_path / "n.png", images=3, k=2)
    assert torch.equal(grid["rows"]["mixed rand"], test)
    assert torch.equal(grid["rows"]["nearest 1"], train[[0, 3, 2]])
    assert torch.equal(grid["rows"]["nearest 2"], train[[1, 4, 1]])
    assert grid["marks"]["nearest 1"].tolist() == [True, True, False]
    pictures.neighbours_grid(dataset, features, "mixed_rand", tmp_path / "n.png", images=99, k=99)  # all there are
    assert list(grid["rows"]) == ["mixed rand", *(f"nearest {rank}" for rank in range(1, 7))]


@pytest.mark.parametrize("name", ["$5-$10", "$5_$", "_hidden", "a_1^2", r"\frac{", "100 %", "<b>&amp;", "猫"])
def test_names_of_classes_are_drawn_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Two dollars are mathematics to matplotlib, and a leading underscore leaves a name out of a legend."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "Figure", lambda **keys: drawn.append(Figure(**keys)) or drawn[-1])
    split = ArraySplit(random_images(6), torch.arange(6) % 2)
    dataset = Dataset("toys", [name, "other"], 8, split, {name: split})
    pictures.map_figure(dataset, torch.randn(6, 4), name, tmp_path / "map.png")
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None
    shown = legend.get_texts()[0]
    assert not is_math_text(shown.get_text())
    assert shown.get_text().strip("\u200b").replace(r"\$", "$") == name
    pictures._grid({name: random_images(2)}, tmp_path / "grid.png")
    assert (tmp_path / "map.png").exists()
    assert (tmp_path / "grid.png").exists()


def test_a_grid_is_a_picture(tmp_path: Path) -> None:
    """The first image is red, and it is drawn above the others and left."""
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[0, 0] = 255
    rows: dict[str, Any] = {"a": images, "b": (images, torch.rand(3, 8, 8)), "c": images[:2]}
    pictures._grid(rows, tmp_path / "grid.png", marks={"a": torch.tensor([True, False, True])})
    picture = decode_image(str(tmp_path / "grid.png"))[:3].int()
    red = (picture[0] > 200) & (picture[1] < 50)
    rows_of_red = red.any(1).nonzero().flatten()
    assert rows_of_red.numel() > 0
    assert (red.nonzero()[:, 1] < picture.shape[2] * 0.7).all()
    green = (picture == torch.tensor([0, 0x9E, 0x73])[:, None, None]).all(0)
    assert green.any()
    assert green.any(1).nonzero().max() < picture.shape[1] / 2
