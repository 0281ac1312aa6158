"""The cache of textures: what it holds, that it goes on where it was killed, and that training reads it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.programs import Programs, until
from support.tiny import DATA, dataset, trained

from icl_msr import textures
from icl_msr.cli import quilting
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit
from icl_msr.data.sources import read_image
from icl_msr.negatives import TextureNegatives
from icl_msr.training.datamodule import NEGATIVES

CPU = torch.device("cpu")


def generator() -> TextureNegatives:
    return TextureNegatives(
        count=1,
        example=96,
        block=36,
        overlap=6,
        reference=224,
        candidates=16,
        tolerance=0.1,
        alpha=2.0,
        alpha_mode="exponent",
        alpha_schedule="constant",
        repulsion=0.25,
    )


def write_images(root: Path, count: int, side: int = 32) -> list[str]:
    """Noise in two classes, `<root>/train/<class>/<i>.bmp`, and a test image of each."""
    random = np.random.default_rng(0)
    paths = [root / "train" / "ab"[i % 2] / f"{i:03d}.bmp" for i in range(count)]
    for path in [*paths, root / "val" / "a" / "x.bmp", root / "val" / "b" / "x.bmp"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side + 8, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def photographs(tmp_path: Path) -> Dataset:
    files = write_images(tmp_path / "data", 10, side=48)
    return Dataset("photographs", ("a", "b"), 32, FileSplit(files, torch.arange(10) % 2, 32), {})


def test_textures_are_sewn_from_the_raw_images(photographs: Dataset, tmp_path: Path) -> None:
    assert quilting.write(photographs, generator(), tmp_path / "cache", 5, CPU) == (10, 0)
    key = keys(5, 0, torch.arange(10), NEGATIVES)
    assert isinstance(photographs.train, FileSplit)
    raw = torch.stack([photographs.train.image(i) for i in range(10)])
    assert raw.shape == (10, 3, 48, 56)  # neither resized nor cut
    examples = generator().examples(raw, key, 14)
    expected = generator().quilt(examples, key, 32, 32)[:, 0]
    for i, texture in enumerate(expected):
        file = tmp_path / "cache" / "ab"[i % 2] / f"{i:03d}.png"
        assert torch.equal(read_image(file, str(file)), texture)


def test_sound_files_are_kept_and_others_replaced(photographs: Dataset, tmp_path: Path) -> None:
    base = tmp_path / "cache"
    quilting.write(photographs, generator(), base, 5, CPU)
    whole = content(base)
    (base / "a" / "000.png").unlink()
    (base / "b" / "001.png").write_bytes(whole["b/001.png"][:-20])
    (base / "a" / "002.png").write_bytes(b"")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(base / "b" / "003.png")  # of another size
    flipped = bytearray(whole["a/004.png"])
    flipped[len(flipped) // 2] ^= 1
    (base / "a" / "004.png").write_bytes(flipped)
    (base / "a" / ".004.png.tmp").write_bytes(b"half")  # what a kill leaves
    before = (base / "a" / "006.png").stat().st_mtime_ns
    assert quilting.write(photographs, generator(), base, 5, CPU) == (5, 5)
    assert {name: data for name, data in content(base).items() if not name.endswith(".tmp")} == whole
    assert (base / "a" / "006.png").stat().st_mtime_ns == before
    assert quilting.write(photographs, generator(), base, 5, CPU) == (0, 10)


def test_images_that_are_smaller_than_an_example(tmp_path: Path) -> None:
    files = write_images(tmp_path / "data", 2, side=8)
    small = Dataset("small", ("a", "b"), 32, FileSplit(files, torch.arange(2), 32), {})
    assert quilting.write(small, generator(), tmp_path / "cache", 0, CPU) == (2, 0)


def test_a_folder_with_other_textures_is_refused(tmp_path: Path) -> None:
    quilting.claim(tmp_path, {"seed": 0, "block": 36})
    quilting.claim(tmp_path, {"seed": 0, "block": 36})
    with pytest.raises(UserError, match=r"holds textures with seed=0, and 1 was asked for; .*--to FOLDER"):
        quilting.claim(tmp_path, {"seed": 1, "block": 36})


def test_training_reads_what_was_written(tmp_path: Path) -> None:
    """Arrays have no names; their numbers take the place."""
    quilting.write(dataset(), generator(), tmp_path / "train", 0, CPU)
    words = ("method=moco", "regularizer=none", "negatives=cached", f"negatives.folder={tmp_path}")
    module, trainer = trained(*words)
    assert trainer.global_step == 2
    assert module.latest is not None
    assert module.latest.targets.negatives is not None


# Real processes


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path / "programs")
    yield started
    started.close()


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_files(programs: Programs, tmp_path: Path) -> None:
    write_images(tmp_path / "data", 400)
    words = ("dataset=imagefolder", f"dataset.root={tmp_path}/data", "dataset.image_size=32", "hardware=cpu")
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def start(folder: Path) -> int:
        program = programs.start(*words, "--to", str(folder), module="icl_msr.textures")
        return program.wait()

    program = programs.start(*words, "--to", str(cut), module="icl_msr.textures")
    until(lambda: len(list(cut.rglob("*.png"))) > 20)
    program.send(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    assert 20 < len(list(cut.rglob("*.png"))) < 400
    assert start(cut) == start(whole) == 0
    assert len(content(whole)) == 401
    assert content(cut) == content(whole)
    assert json.loads((whole / "textures.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["negatives=patch"], "One texture per image is made, by image quilting; type negatives=texture"),
        (["negatives.count=2"], "One texture per image is made"),
        (["negatives.blok=3"], "negatives.blok is not a key; did you mean negatives.block"),
        (["negatives.block=100"], "blocks of 100 pixels with edges of 6 from examples of 96 do not fit"),
    ],
)
def test_mistakes_leave_no_folder(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["icl_msr.textures"])
    assert textures.main(["--to", str(tmp_path / "cache"), *DATA, "hardware=cpu", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(sentence)
    assert not (tmp_path / "cache").exists()
