"""A signal ends every command in one sentence and exit code 75, whatever it is doing."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.programs import Programs, until
from support.tiny import DATA, MODEL
from support.written import write_run

from icl_msr.core.signals import SIGNALS, Stopped, give_back, stoppable, take_signals

RUN = ("icl_msr.run", *DATA, *MODEL, "logger=csv", "hydra.run.dir=run")
EVALUATE = ("icl_msr.evaluate", "encoder=timm:test_vit", "weights=null", *DATA, "to=to", "cache=null")
REPORT = ("icl_msr.report", "runs")
AGAIN = "Stopped by {}; the same command begins again.\n"
PHASES = [
    (RUN, "torch", "SIGHUP", AGAIN),
    (EVALUATE, "torch", "SIGINT", AGAIN),
    (REPORT, "matplotlib", "SIGUSR1", AGAIN),
]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.close()


@pytest.mark.parametrize(("command", "package", "name", "said"), PHASES, ids=[phase[0][0] for phase in PHASES])
def test_while_a_command_begins(
    command: tuple[str, ...], package: str, name: str, said: str, programs: Programs, tmp_path: Path
) -> None:
    """As soon as a package is loaded."""
    for seed in range(20):
        write_run(tmp_path / "runs" / str(seed), seed=seed)
    module, *words = command
    program = programs.start(*words, module=module)
    maps = Path("/proc", str(program.process.pid), "maps")
    until(lambda: f"/{package}/" in maps.read_text() or program.process.poll() is not None)
    program.send(signal.Signals[name])
    assert program.wait() == 75, program.err
    assert program.err == said.format(name)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(other) for other in SIGNALS]
    with pytest.raises(Stopped) as stopped, stoppable(), stoppable(lambda cause: f"{cause} came."):
        os.kill(os.getpid(), number)
    assert stopped.value.code == 75
    assert capsys.readouterr().err == f"{number.name} came.\n"
    assert [signal.getsignal(other) for other in SIGNALS] == before


def test_nohup_keeps_its_effect() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        taken = take_signals(lambda *_: None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        give_back(taken)
        assert signal.SIGHUP not in taken
    finally:
        signal.signal(signal.SIGHUP, before)
