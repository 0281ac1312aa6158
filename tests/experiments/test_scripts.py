"""Every script under experiments/ runs, at the smallest sizes; a new one needs nothing but a `--tiny`."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.inprocess import finish

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for file in (ROOT / "experiments").rglob("*.py")
    if "examples" not in file.parts and not file.name.startswith("train_") and "__main__" in file.read_text()
)
"""`test_examples.py` runs the examples. The scripts train_* need other libraries in an environment of their own."""

WORDS: dict[str, list[str]] = {
    "experiments.study": ["run", str(ROOT / "experiments" / "msr"), "--dry"],
    "experiments.benchmarks.negatives": ["--tiny", "--without", "all blocks"],
    "experiments.benchmarks.peers.__main__": ["views", "losses", "steps", "kNN", "--tiny"],
    "experiments.benchmarks.scaling": ["wire", "index", "--tiny"],
    "experiments.msr.modes": ["memory", "tiny", "2", "32-true", "cl", "exact"],
}
"""What is typed where `--tiny` is not all."""

ELSEWHERE = {
    *("experiments.methods_table", "experiments.benchmarks.gpu", "experiments.negatives.compare"),
    "experiments.benchmarks.loading_peers",
}
"""`test_readme.py` runs the table of methods, `test_gpu.py` the script for a GPU; the comparison needs a run, below;
the peers need an environment of their own."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Scripts change what belongs to their process."""
    threads, logger = torch.get_num_threads(), logging.getLogger("pytorch_lightning")
    level = logger.level
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    words = ("regularizer=none", "evaluation=none", "~callbacks.online", "trainer.max_epochs=1")
    return finish(tmp_path_factory.mktemp("finished"), *words).folder


def run(script: str, *words: str) -> None:
    importlib.import_module(script).main(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(script, "--help")
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in ELSEWHERE])
def test_runs(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(script, *WORDS.get(script, ["--tiny"]))
    assert capsys.readouterr().out


def test_runs_on_a_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("experiments.negatives.compare", str(finished), "--tiny", "--to", str(tmp_path))
    assert "white noise" in capsys.readouterr().out
    rows = (tmp_path / "compare.csv").read_text().splitlines()
    assert rows[0] == "generator,gram,histogram,class_read_percent"
    assert rows[1].split(",")[:3] == ["the image itself", "0", "0"]
    assert len(rows) == 16


@pytest.mark.parametrize(
    ("what", "rows"), [("agreement", 9), ("signal", 2), pytest.param("speed", 10, marks=pytest.mark.slow)]
)
def test_modes(what: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("experiments.msr.modes", what, "--tiny", "--to", str(tmp_path))
    assert capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert len(file.read_text().splitlines()) == 1 + rows
