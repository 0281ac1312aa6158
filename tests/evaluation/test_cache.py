import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.ranks import Ranks
from torch import Tensor

from icl_msr.core.distributed import rank
from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit
from icl_msr.data.files import FileSplit
from icl_msr.evaluation.cache import FeatureCache, encoder_identity, split_identity
from icl_msr.models.backbones import Backbone, tiny

HERE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "device": "cpu", "batch_size": 4}


@pytest.fixture
def encoder() -> Backbone:
    torch.manual_seed(0)
    return tiny(32, weights=None)


@pytest.fixture
def split() -> ArraySplit:
    images = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ArraySplit(images, torch.zeros(6, dtype=torch.int64))


def test_what_was_made_is_found_again(encoder: Backbone, split: ArraySplit, tmp_path: Path) -> None:
    first = FeatureCache(tmp_path)
    made = first(encoder, split, **HERE)  # type: ignore[arg-type]
    assert first.found == 0
    later = FeatureCache(tmp_path)
    assert torch.equal(later(copy.deepcopy(encoder), ArraySplit(split.images.clone(), split.labels), **HERE), made)  # type: ignore[arg-type]
    assert later.found == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".safetensors"]


def test_anything_else_is_made_anew(encoder: Backbone, split: ArraySplit, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache(encoder, split, **HERE)  # type: ignore[arg-type]
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-3
    statistics = copy.deepcopy(encoder)
    statistics.get_buffer("net.bn1.running_mean")[0] += 1
    code = copy.deepcopy(encoder)
    code.load += "\n# another network with these weights"
    images = split.images.clone()
    images[5, 2, 31, 31] ^= 1
    for network, shown, keys in (
        (other, split, HERE),
        (statistics, split, HERE),
        (code, split, HERE),
        (encoder, ArraySplit(images, split.labels), HERE),
        (encoder, ArraySplit(split.images.flip(0), split.labels), HERE),
        (encoder, split, HERE | {"mean": (0.5, 0.5, 0.4)}),
        (encoder, split, HERE | {"std": (0.25, 0.25, 0.2)}),
    ):
        cache(network, shown, **keys)  # type: ignore[arg-type]
    assert cache.found == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8
    cache(encoder, split, **HERE | {"batch_size": 5})  # type: ignore[arg-type]
    assert cache.found == 1


def test_files_are_known_by_path_size_and_time(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (40, 40), (i, 2, 3)).save(tmp_path / f"{i}.png")
    split = FileSplit([str(tmp_path / f"{i}.png") for i in range(2)], torch.zeros(2, dtype=torch.int64), 32)
    known = split_identity(split)
    assert known == split_identity(split)
    assert known != split_identity(FileSplit(split.files[::-1], split.labels, 32))
    assert known != split_identity(FileSplit(split.files, split.labels, 16))
    assert known != split_identity(
        FileSplit(split.files, split.labels, 32, torch.tensor([[0, 0, 9, 9]] * 2), None, "fg")
    )
    Image.new("RGB", (40, 40), (200, 2, 3)).save(tmp_path / "0.png")
    assert known != split_identity(split)


def test_what_cannot_be_told_apart_is_not_kept(encoder: Backbone, split: ArraySplit, tmp_path: Path) -> None:
    class Unknown:
        labels = split.labels

        def __len__(self) -> int:
            return 6

        def load(self, index: torch.Tensor) -> torch.Tensor:
            return split.images[index]

    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4))
    assert encoder_identity(plain) is None
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        cache(plain, split, **HERE)  # type: ignore[arg-type]
        cache(encoder, Unknown(), **HERE)  # type: ignore[arg-type]
    assert cache.found == 0
    assert not list(tmp_path.iterdir())


def test_without_a_folder_features_are_held_in_memory(encoder: Backbone, split: ArraySplit) -> None:
    cache = FeatureCache(None)
    assert torch.equal(cache(encoder, split, **HERE), cache(encoder, split, **HERE))  # type: ignore[arg-type]
    assert cache.found == 1


def test_a_full_disk_costs_the_file_alone(
    encoder: Backbone, split: ArraySplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("The disk is full.")

    cache = FeatureCache(tmp_path)
    monkeypatch.setattr("icl_msr.evaluation.cache.atomic_write", full)
    assert cache(encoder, split, **HERE).shape == (6, 128)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(UserError, match="give another folder, cache=FOLDER"):
        FeatureCache(Path("/proc/none"))


def test_half_precision_has_features_of_its_own(encoder: Backbone, split: ArraySplit, tmp_path: Path) -> None:
    full = FeatureCache(tmp_path)(encoder, split, **HERE)  # type: ignore[arg-type]
    cache = FeatureCache(tmp_path, torch.bfloat16)
    half = cache(encoder, split, **HERE)  # type: ignore[arg-type]
    assert cache.found == 0
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)


def ask_cache(folders: list[str]) -> tuple[int, Tensor]:
    torch.manual_seed(0)
    encoder = tiny(32, weights=None)
    images = torch.randint(256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    cache = FeatureCache(Path(folders[rank()]))
    features = cache(encoder, ArraySplit(images, torch.zeros(6, dtype=torch.int64)), **HERE)  # type: ignore[arg-type]
    return cache.found, features


def test_ranks_find_features_together_or_not_at_all(two_ranks: Ranks, tmp_path: Path) -> None:
    """Of nodes without a common disk, one may have the file and the other not: both must then take part."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    expected = ask_cache([one])[1]
    for folders, found in (([one, other], 0), ([other, one], 0), ([one, one], 1)):
        for count, features in two_ranks(ask_cache, folders):
            assert count == found
            assert torch.equal(features, expected)
        assert bool(list(Path(other).rglob("*.safetensors"))) == (found != 0 or folders[0] == other)  # the first writes
