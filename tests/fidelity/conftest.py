"""The largest difference of each comparison; `pytest -vv tests/fidelity` ends with a table of them."""

from collections.abc import Callable
from typing import Any

import pytest
from support.naive import Close
from torch import Tensor


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Close:
    """Compare two tensors, and keep the largest difference for the table."""

    def compare(name: str, ours: Any, theirs: Any, tolerance: float) -> None:
        difference = (Tensor.double(ours) - Tensor.double(theirs)).abs().max().item()
        scale = max(1.0, Tensor.double(theirs).abs().max().item())
        record_property("difference", (name, difference / scale, tolerance))
        assert difference <= tolerance * scale

    return compare


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found: dict[str, tuple[float, float]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for key, value in report.user_properties:
            if key == "difference":
                name, difference, tolerance = value
                found[name] = (max(difference, found.get(name, (0.0,))[0]), tolerance)
    if found and config.get_verbosity() > 0:
        terminalreporter.section("largest relative differences")
        for name, (difference, tolerance) in found.items():
            terminalreporter.line(f"{name:66} {difference:9.1e}  at most {tolerance:.0e}")
