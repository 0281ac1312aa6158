"""The command that writes shards goes on where it was killed, and a run from shards is the run from the folder."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import stores
from support.programs import Program, Programs, same, steps, until
from support.tiny import MODEL, composed, trained

from icl_msr import shards
from icl_msr.cli.sharding import MANIFEST
from icl_msr.core import randomness
from icl_msr.core.config import build, check
from icl_msr.data.files import FileSplit

RUN = [
    *MODEL,
    *("dataset.image_size=16", "dataset.resident_size=0", "loader.block=512", "regularizer=none", "hardware=cpu"),
    *("method=moco", "method.queue_size=32", "logger=csv", "evaluation=none", "~callbacks.online"),
    *("trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_minutes=0.0001", "trainer.max_epochs=2"),
]


def photographs(root: Path, count: int) -> Path:
    """Noise in two classes, as JPEG files, with test images."""
    random = np.random.default_rng(0)
    for part, images in (("train", count), ("val", 8)):
        for i in range(images):
            path = root / part / "ab"[i % 2] / f"{i:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path)
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["icl_msr.shards"])
    code = shards.main([*words, "hardware=cpu"])
    return code, *capsys.readouterr()


def test_weights_from_shards_are_those_from_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "RUNS", 4)  # so that blocks of 8 have runs of 2
    root, to = photographs(tmp_path / "folder", 40), tmp_path / "shards"
    words = ["--to", str(to), "--images", "9", "dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16"]
    code, out, _ = command(capsys, monkeypatch, *words)
    assert (code, out) == (0, f"6 shards written, 0 kept   {to}\n")
    code, out, _ = command(capsys, monkeypatch, *words)
    assert (code, out) == (0, f"0 shards written, 6 kept   {to}\n")
    whole = (to / MANIFEST).read_bytes()
    (to / MANIFEST).write_bytes(whole[:40])
    code, _, err = command(capsys, monkeypatch, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{to}/{MANIFEST} is damaged (" in err
    (to / MANIFEST).write_bytes(whole)
    weights = []
    for source in (["dataset=imagefolder", f"dataset.root={root}"], ["dataset=shards", f"dataset.url={to}"]):
        data = build(check(composed(*source, "dataset.image_size=16", "dataset.resident_size=0")).dataset)
        assert isinstance(data.train, FileSplit)
        module, trainer = trained("regularizer=none", "loader.num_workers=0", "loader.block=8", data=data)
        weights.append(module.state_dict())
        seen = [views.index for views in trainer.datamodule.epoch(0, torch.device("cpu"))]
        assert torch.equal(torch.cat(seen), randomness.permutation(0, 0, 40, 8))
        assert not torch.equal(torch.cat(seen), randomness.permutation(0, 0, 40))
    same(*weights)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dataset=imagefolder", "dataset.root=gone"], "There is no folder gone; set dataset.root"),
        (["dataset=imagefolder"], "dataset.root has no value yet"),
        (["dataset.tran=3"], "dataset.tran is not a key; did you mean dataset.train"),
    ],
)
def test_mistakes_leave_no_folder(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = command(capsys, monkeypatch, "--to", str(tmp_path / "shards"), *words)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert not (tmp_path / "shards").exists()


# Real processes


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path / "programs")
    yield started
    started.close()


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_files(programs: Programs, tmp_path: Path) -> None:
    root = photographs(tmp_path / "folder", 3000)
    words = ("dataset=imagefolder", f"dataset.root={root}", "hardware=cpu", "--images", "10")
    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def start(folder: Path) -> Program:
        return programs.start(*words, "--to", str(folder), module="icl_msr.shards")

    program = start(cut)
    until(lambda: len(list(cut.glob("*.tar"))) > 20)
    program.send(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    assert 20 < len(list(cut.glob("*.tar"))) < 301
    assert start(cut).wait() == start(whole).wait() == 0
    assert len(content(whole)) == 2 * 301 + 1
    assert content(cut) == content(whole)


@pytest.mark.slow
def test_a_run_from_a_store_goes_on_with_other_workers(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed in the middle of an epoch, and ends with the weights of an uninterrupted run from the folder."""
    root = photographs(tmp_path / "folder", 600)
    with stores.s3(monkeypatch) as bucket:
        url = f"s3://{bucket}/set"
        words = ("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", "hardware=cpu")
        program = programs.start(*words, "--images", "50", "--to", url, module="icl_msr.shards")
        assert program.wait() == 0, program.err
        whole = programs(*RUN, "dataset=imagefolder", f"dataset.root={root}", f"hydra.run.dir={tmp_path}/whole")
        assert whole.wait() == 0, whole.err
        remote = (
            "dataset=shards",
            f"dataset.url={url}",
            f"dataset.cache={tmp_path}/cache",
            f"hydra.run.dir={tmp_path}/cut",
        )
        cut = programs.start(*RUN, *remote, "loader.num_workers=2")
        until(lambda: steps(tmp_path / "cut") > 90)  # of 75 in an epoch
        cut.send(signal.SIGKILL)
        assert cut.wait() == -signal.SIGKILL
        programs.gone()
        saved = torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert saved % 75
        resumed = programs(f"resume={tmp_path}/cut", "loader.num_workers=4")
        assert resumed.wait() == 0, resumed.err
        assert f"from step {saved}" in resumed.out
    last = [torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "cut")]
    assert last[0]["global_step"] == last[1]["global_step"] == 150
    for part in ("state_dict", "optimizer_states"):
        same(last[0][part], last[1][part])
