"""What all comparisons share."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from icl_msr.training.hardware import Hardware, Plan

Calls = dict[str, Callable[[], object]]

OURS, OURS_AS_THEIRS = "ours", "ours, fp32, contiguous"
"""With our defaults on this machine, and with the precision and the memory format that the others have by default."""


@dataclass
class Row:
    """One comparison.

    `make` returns the calls of each library, ours first. It is called when the row is measured, so that one row's data
    are in memory at a time.
    """

    name: str
    make: Callable[[], Calls]
    own_memory: bool = True
    """The calls run in this process, so that its peak memory tells what they need."""
    warm_up: bool = True
    """A first call of each library is left out."""


@dataclass(frozen=True)
class Size:
    """How much of everything is measured; `tiny` is only to see that it runs."""

    tiny: bool

    def __call__(self, usual: int, tiny: int) -> int:
        """Return one of two counts."""
        return tiny if self.tiny else usual


def installed(package: str) -> bool:
    """Return whether a library is there."""
    return importlib.util.find_spec(package) is not None


def plan() -> Plan:
    """Return the precision and the memory format of `hardware=auto` on this machine's CPU."""
    hardware = Hardware(
        accelerator="cpu",
        devices=1,
        nodes=1,
        precision="auto",
        channels_last=True,
        compile=False,
        tf32=False,
        requeue=False,
    )
    return hardware.plan()
