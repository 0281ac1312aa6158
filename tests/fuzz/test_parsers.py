"""Damaged and hostile files of every kind are read, or answered in one sentence. Hypothesis makes them.

`make fuzz` tries many more, and lets atheris look for branches that none has reached.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.parsers import PARSERS, make_folder, read

PIECES = [b"", b"\0", b"\xff", b"\n", b"\r", b",", b'"', b"'", b" ", b"-1", b"9" * 30, b"9" * 5000, b"nan", b"1e999"]
PIECES += [b"null", b"[]", b"{}", b"[" * 2000, b"{a: " * 50, b"&a [*a]", b"${oc.env:HOME}", b"!!python/name:os.system"]
PIECES += [
    "²".encode(),
    "\u2028".encode(),
    b"\xef\xbb\xbf",
    b"x" * 200_000,
    b"../../etc/passwd",
    b"/dev/zero",
    b"\xff\xff\xff\x7f",
]
places = st.floats(0, 1)
changes = st.tuples(places, places, st.sampled_from(PIECES) | st.binary(max_size=8), st.booleans())


@st.composite
def damaged(draw: Callable[..., object], valid: bytes) -> bytes:
    """A valid content with pieces inserted, replaced, repeated or cut off, or other bytes altogether."""
    content = valid
    for begin, length, piece, small in draw(st.lists(changes, min_size=1, max_size=3)):  # type: ignore[attr-defined]
        start = int(begin * len(content))
        stop = start + (len(piece) if small else int(length**3 * len(content)))
        content = content[:start] + piece + content[stop:]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("kind", PARSERS)
def test_a_valid_file_is_read(kind: str, folder: Path) -> None:
    assert read(kind, folder, PARSERS[kind].valid) in (None, "") or kind in ("recipe", "results", "captions")


@pytest.mark.parametrize("kind", PARSERS)
def test_a_damaged_file_is_read_or_answered(kind: str, folder: Path) -> None:
    @settings(suppress_health_check=list(HealthCheck))
    @given(damaged(PARSERS[kind].valid))
    def check(content: bytes) -> None:
        read(kind, folder, content)

    check()
