"""How a run ends: the results first, and what cannot be drawn costs itself alone."""

import re
import resource
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from support.inprocess import Answer, execute
from support.tiny import DATA, MODEL

from icl_msr.cli import conclude
from icl_msr.core.records import Outcome
from icl_msr.evaluation import pictures
from icl_msr.training import loggers
from icl_msr.training.module import Pretraining

SMALL = [*DATA, *MODEL, "trainer.limit_train_batches=1", "evaluation=none", "logger=csv", "hardware=cpu"]
Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`python -m icl_msr.run`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return execute


def test_a_disk_that_is_full_at_the_pictures(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are whole by then, and the same command makes the page that is missing."""
    words = [*SMALL, "trainer.max_epochs=1", "~callbacks.online", "hydra.run.dir=run"]
    run_folder, usual = Path("run").resolve(), Path.open

    def full(path: Path, *arguments: Any, **keys: Any) -> Any:
        """Say what the kernel says of a full disk."""
        return FileIO("/dev/full", "w") if path.name == ".views.png.tmp" else usual(path, *arguments, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        code, _, err = command(*words)
    kept = "the previous views.png, if any, is kept"
    said = f"The disk of {run_folder}/figures is full; {kept}: free space and continue with resume={run_folder}.\n"
    assert (code, err) == (2, said)
    results = Path("run/results.json").read_bytes()
    assert not Path("run/report.html").exists()

    monkeypatch.setattr(Pretraining, "training_step", lambda *_: pytest.fail("trained again"))
    page = Path("run/report.html")
    for _ in range(2):
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        assert "is finished and stays as it is" in out
        assert "report   " in out
        assert page.read_text().endswith("</html>")
        page.write_text(page.read_text()[:1000])  # cut
    assert Path("run/results.json").read_bytes() == results


def test_a_limit_of_files_is_found_before_training(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100_000, 100_000))
    code, _, err = command(*SMALL, "trainer.max_epochs=1", "hydra.run.dir=run")
    assert code == 2
    assert re.fullmatch(
        r"A checkpoint needs \d\.\d MB, and files may have 0\.1 MB \(ulimit -f\); raise the limit\.\n", err
    )
    assert not Path("run").exists()


def test_pictures_pages_and_dashboards_that_fail_cost_themselves_alone(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, "trainer.max_epochs=1", "~callbacks.online", "evaluation=light"]

    def fails(*_: object, **__: object) -> None:
        raise ValueError("the pencil broke.\nTwice.")

    for name in pictures.PICTURES:
        monkeypatch.setitem(pictures.PICTURES, name, fails)
    code, out, err = command(*words, "hydra.run.dir=one")
    assert (code, err) == (0, "")
    every = "; ".join(f"{name} (the pencil broke)" for name in pictures.PICTURES)
    assert f"The results are complete, but {every} could not be made." in " ".join(out.split())
    assert Outcome.load(Path("one")).records.where("accuracy")
    assert Path("one/report.html").read_text().endswith("</html>")

    monkeypatch.setattr(conclude, "write_report", fails)
    monkeypatch.setattr(loggers.TensorBoard, "conclude", fails)
    code, out, err = command(*words, "hydra.run.dir=two", "logger=tensorboard")
    assert (code, err) == (0, "")
    said = "report.html (the pencil broke); TensorBoard (the pencil broke) could not be made."
    assert said in " ".join(out.split())
    assert Outcome.load(Path("two")).records.where("accuracy")
