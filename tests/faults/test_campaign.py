"""Commands are harmed in every phase: each ends in a sentence or by the kill, and in equal weights after `resume=`."""

from pathlib import Path

import pytest
from faults.campaign import FAULTS, PHASES, Fault, Row, carry_out, line, may_mount


@pytest.mark.slow
def test_every_fault_ends_in_a_sentence_and_in_equal_weights(tmp_path: Path) -> None:
    if not may_mount(tmp_path / "disk"):
        pytest.skip("needs the right to mount")
    rows = []
    for row in carry_out(FAULTS, tmp_path):
        print(line(row, tmp_path), flush=True)
        rows.append(row)
    assert [line(row, tmp_path) for row in rows if not row.good] == []


def test_every_phase_is_harmed() -> None:
    for name in ("SIGKILL", "SIG", "disk full", "read-only", "folder deleted", "ulimit"):
        phases = {fault.phase for fault in FAULTS if name in fault.name}
        assert phases >= set(PHASES if "SIG" in name else PHASES[1:]), name


@pytest.mark.parametrize(
    ("said", "code", "after", "good"),
    [
        ("The disk is full.\n", 2, "equal", True),
        ("", 2, "equal", False),
        ("The disk is full.\n", 1, "equal", False),
        ("The disk is full.\n", 2, "weights differ", False),
        ("One.\nTwo.\n", 2, "equal", False),
        ("Traceback\n", 2, "equal", False),
    ],
)
def test_what_is_a_good_end(said: str, code: int, after: str, good: bool) -> None:
    assert Row(Fault("training", "disk full", lambda _: None), said, code, after).good == good
