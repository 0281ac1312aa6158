"""The memory of this machine, and what to say if it is too small."""

import os
from contextlib import suppress
from pathlib import Path

from icl_msr.core.errors import UserError

SHORT = (
    "This needs more memory than there is; choose smaller sizes, such as loader.batch_size, dataset.image_size or "
    "method.queue_size."
)

_SIGNS = ("allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
"""Parts of the messages with which torch refuses an allocation."""


def memory_is_short(error: BaseException) -> bool:
    """Return whether an error says that memory cannot be allocated. Torch has no class of its own for it on a CPU."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError | RuntimeError) and any(sign in said for sign in _SIGNS)
    )


def require_memory(what: str, needed: float, advice: str) -> None:
    """Check that the machine has as many bytes of memory as something needs.

    The kernel grants more memory than there is, and ends the process without a word once it is used.

    Raises:
        UserError: it has less. The message begins with `what` and ends with `advice`.
    """
    there = memory()
    if needed > there:
        raise UserError(
            f"{what} would need {needed / 1e9:.3g} GB of memory, and this machine has {there / 1e9:.3g} GB; {advice}."
        )


def memory() -> int:
    """Return the bytes of memory that this process may use: those of the machine or of its control group."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no control group, or no limit
            there = min(there, int(Path(limit).read_text()))
    return there
