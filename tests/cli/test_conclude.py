"""How a run ends: the results first, and what cannot be drawn costs itself alone."""

from collections.abc import Callable
from pathlib import Path

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
    picture = Path("run/figures/views.png")
    picture.parent.mkdir(parents=True)
    picture.symlink_to("/dev/full")
    code, _, err = command(*words)
    run_folder = Path("run").resolve()
    assert (code, err) == (2, f"The disk of {run_folder} is full; free space and continue with resume={run_folder}.\n")
    results = Path("run/results.json").read_bytes()
    assert not Path("run/report.html").exists()
    picture.unlink()

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
