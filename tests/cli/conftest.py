from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.jobs import Answer, sweep_command


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Answer]]:
    """A sweep whose jobs are done at once. Files about other commands have a fixture of this name for themselves."""
    yield from sweep_command(tmp_path, monkeypatch, capfd)
