"""Every command answers a mistake in its arguments in one sentence, and prints names as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.written import write_run

from icl_msr import evaluate, export, textures
from icl_msr.core import memory
from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded
from icl_msr.core.terminal import answering, complain, plain_console
from icl_msr.report import __main__ as report

MAINS = {"evaluate": evaluate.main, "export": export.main, "textures": textures.main, "report": report.main}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("evaluate --seed=3", "Unrecognized arguments: --seed=3"),
        ("evaluate run=nowhere to=s3://bucket/results", "nowhere"),
        ("export", "required: RUN"),
        ("export nowhere --encoder=other", "--encoder: invalid choice: 'other'"),
        ("export nowhere --to", "--to: expected one argument"),
        ("export nowhere --to=s3://bucket", "--to=s3:/bucket is a URL"),
        ("textures dataset=confounded", "required: --to"),
        ("textures --to=s3://bucket", "--to=s3:/bucket is a URL"),
        ("report", "required: PATH"),
        ("report . --foo", "Unrecognized arguments: --foo"),
    ],
)
def test_arguments(
    line: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *words = line.split()
    assert MAINS[command](words) == 2
    out, err = capfd.readouterr()
    (said,) = err.splitlines()
    assert (out, part in said) == ("", True), said
    assert not list(tmp_path.iterdir())


def test_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    complain("a\nb \x1b[31m \udc80 é [bold]")
    assert capsys.readouterr().err == "a\\nb \\x1b[31m \\udc80 é [bold]\n"


def test_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print("exp [final] :smile: [/]")
    assert capsys.readouterr().out == "exp [final] :smile: [/]\n"


@pytest.mark.parametrize(
    ("fault", "code"),
    [(UserError("no"), 2), (MemoryError(), 2), (RuntimeError("not enough memory: 9"), 2)],
)
def test_how_a_command_ends(fault: Exception, code: int) -> None:
    @answering
    def main() -> int:
        raise fault

    assert main() == code


def test_a_fault_of_the_program_is_raised() -> None:
    @answering
    def main() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--foo",), 2)])
def test_a_report_outlives_the_reader_of_its_output(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """As of `2>&1 | head -c 0`."""
    write_run(tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "icl_msr.report", str(tmp_path), *words]
    assert subprocess.run(line, stdout=writer, stderr=writer, check=False).returncode == code
    os.close(writer)
    assert (tmp_path / "summary.csv").exists() == (code == 0)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory", lambda: 2_000_000_000)
    memory.require_memory("This", 2e9, "make it smaller")
    with pytest.raises(UserError, match=r"^This would need 2\.5 GB of memory, .* has 2 GB; make it smaller\.$"):
        memory.require_memory("This", 2.5e9, "make it smaller")


def test_a_home_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(expanded(path)) for path in ("~/a", "~nobody-here/a", "a")] == ["/home/me/a", "~nobody-here/a", "a"]


def test_a_log_on_a_full_disk_stops_nothing() -> None:
    with open("/dev/full", "wb") as full:
        line = [sys.executable, "-m", "icl_msr.export", "--help"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
