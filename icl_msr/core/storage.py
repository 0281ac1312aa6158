"""Files that are on the disk whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from icl_msr.core.errors import UserError


def atomic_write(path: Path, content: bytes | str, advice: str = "repeat the command") -> None:
    """Writes a file whole or not at all, however the process ends; one writer at a time.

    Raises:
        UserError: the disk is full; the old file, if any, is still there. `advice` is what to do once there is room.
    """
    with replacing(path, advice) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, advice: str) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place once it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")  # always the same: what a kill leaves, the next one overwrites
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if disk_is_full(error):
            kept = f"the previous {path.name}, if any, is kept"
            raise UserError(f"The disk of {path.parent} is full; {kept}: free space and {advice}.") from None
        raise
    with suppress(OSError):  # some network file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def disk_is_full(error: BaseException | None) -> bool:
    """Also where torch, closing its archive, has put an error of its own in front."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False
