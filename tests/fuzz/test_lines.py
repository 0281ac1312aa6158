"""Random command lines of every command end in their result or in one sentence, and write nowhere else.

The seed is fixed, so that a failure is a change of the program. `make fuzz SEED=2` tries many more.
"""

from pathlib import Path

from fuzz.__main__ import campaign
from fuzz.child import End, World, fault
from fuzz.grammar import Line


def test_random_lines(tmp_path: Path) -> None:
    assert not campaign(World(tmp_path), seed=0, lines=300)


def test_what_a_fault_is() -> None:
    run, here = Line("run", ("hydra.run.dir='a b'",)), Path("here")
    sentence = "It is wrong; change it.\n"
    good = [End(0, "", "", [here / "a b" / "c", here / "runs"]), End(2, "", sentence, []), End(75, "", "", [])]
    assert [fault(run, end) for end in good] == [None, None, None]
    for end, part in (
        (End(1, "", sentence, []), "exit code 1"),
        (End(-9, "", "", []), "exit code -9"),
        (End(2, "", "", []), "not one sentence"),
        (End(2, "", sentence + sentence, []), "not one sentence"),
        (End(2, "", sentence, [here / "a b"]), "written: here/a b"),
        (End(0, "", "", [here / "c"]), "written: here/c"),
        (End(0, "", "", [Path("home", "c")]), "written: home/c"),
        (End(0, "", "Traceback (most recent call last)\nValueError: x", []), "traceback"),
    ):
        assert part in (fault(run, end) or "")
