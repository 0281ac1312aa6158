"""Files. Small ones are read whole, and a damaged one gives one sentence. Any file is written whole or not at all."""

import csv
import errno
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from icl_msr.core.errors import UserError, reason
from icl_msr.core.memory import require_memory

if TYPE_CHECKING:
    import numpy as np


FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that say that a disk is full."""
SMALL = 50_000_000
"""Largest size of a file that holds facts, in bytes."""
TABLE = 2_000_000_000
"""Largest size of a table of numbers, in bytes."""
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def require_local(folder: str | Path, key: str) -> None:
    """Check that what a key names as a folder to write to is a path, not a URL.

    Raises:
        UserError: it is a URL. Otherwise a local folder of this name would be made.
    """
    if _URL.match(str(folder)):
        raise UserError(
            f"{key}={folder} is a URL, and files are written to local folders; mount it, or copy them there."
        )


def expanded(path: str | Path) -> Path:
    """Return a path with `~` as the home folder. A name such as `~nobody`, of no user, stays as it is."""
    return Path(os.path.expanduser(path))


@contextmanager
def readable(path: Path | str, advice: str) -> Iterator[None]:
    """Read a file inside the context. Any error about its content becomes one sentence.

    Raises:
        UserError: the file is damaged. `advice` says what to do.
        FileNotFoundError: it is not there.
    """
    try:
        yield
    except (UserError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # parsers raise many kinds
        said = reason(error) if isinstance(error, OSError | ValueError) else getattr(error, "problem", None)
        raise UserError(f"{path} is damaged ({said or 'it has another content'}); {advice}.") from None


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        UserError: the file is damaged or holds something else; see `readable`.
        FileNotFoundError: it is not there.
    """
    with readable(path, advice):
        content = json.loads(read_regular(path, SMALL).decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("it does not hold a mapping")
        return content


def read_table(path: Path, advice: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file of numbers by column, without empty cells.

    The last row is left out if it has no line break, because a killed process may leave half a row.

    Raises:
        UserError: the file is damaged or holds something else; see `readable`.
        FileNotFoundError: it is not there.
    """
    with readable(path, advice):
        whole, _, _ = read_regular(path, TABLE).decode("utf-8-sig").rpartition("\n")
        lines = csv.DictReader(whole.splitlines())
        if "step" not in (lines.fieldnames or ()):
            raise ValueError("it has no column step")
        rows = []
        for number, line in enumerate(lines, start=2):
            if None in line:
                raise ValueError(f"line {number} has too many cells")
            rows.append({name: cell for name, cell in line.items() if cell})
            for cell in rows[-1].values():
                float(cell)
        return rows


def read_regular(path: Path, largest: int) -> bytes:
    """Return the content of a regular file. A pipe is never waited for, and a device is not opened.

    Raises:
        UserError: it is something else, or has more than `largest` bytes.
        OSError: it is not there, or cannot be read.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if stat.S_ISREG(os.stat(path).st_mode) else None
    if number is None:
        raise UserError(f"{path} is not a regular file; restore it from a copy.")
    with open(number, "rb") as file:
        if os.fstat(number).st_size > largest:
            raise UserError(f"{path} is larger than {largest / 1e6:g} MB, as no such file is; restore it from a copy.")
        return file.read(largest)


def read_arrays(path: Path) -> "dict[str, np.ndarray[Any, Any]]":
    """Return the arrays of an .npz file by name. Pickles are not read.

    Raises:
        UserError: its arrays need more memory than the machine has.
        Exception: it cannot be read; damaged files raise many kinds.
    """
    import numpy as np

    file = np.load(path)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    with file:
        assert file.zip is not None
        needed = sum(part.file_size for part in file.zip.infolist())
        require_memory(f"The arrays of {path}", needed, "divide them, or write the images as files")
        return {name: file[name] for name in file.files}


def is_stored(archive: zipfile.ZipFile, path: Path) -> bool:
    """Return whether the parts of a zip archive are not compressed, so that they need no more memory than the file."""
    parts = archive.infolist()
    stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    return stored and sum(part.file_size for part in parts) <= path.stat().st_size


def atomic_write(path: Path, content: bytes | str, advice: str = "repeat the command") -> None:
    """Write a file whole or not at all, even if the process is killed. Only one process may write it at a time.

    The folder must exist: a deleted one is not made again, because what belongs to the file is lost.

    Raises:
        UserError: the folder cannot be written, for example because the disk is full. The old file, if any, is kept.
            `advice` says what to do once it can be written.
    """
    with replacing(path, advice) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, advice: str) -> Iterator[IO[bytes]]:
    """Yield a file beside `path` that replaces it once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that the next write replaces what a kill left
    try:
        temporary.unlink(missing_ok=True)  # it could be a link to another file
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if said := unwritable(error, path.parent):
            cause, _, remedy = said.partition("; ")
            kept = f" the previous {path.name}, if any, is kept:" if path.parent.is_dir() else ""
            raise UserError(f"{cause};{kept} {remedy} and {advice}.") from None
        raise
    with suppress(OSError):  # some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def unwritable(error: BaseException | None, folder: Path) -> str | None:
    """Return why a folder cannot be written and what helps, according to an error or to one that it was raised from.

    Return None for errors of other kinds. torch raises an error of its own when it closes its archive after a failed
    write.
    """
    while error is not None:
        if isinstance(error, OSError):
            if error.errno in FULL:
                return f"The disk of {folder} is full; free space"
            if error.errno == errno.EFBIG:
                return f"A file in {folder} may not become as large as it must (ulimit -f); raise the limit"
            if error.errno == errno.EROFS:
                return f"{folder} is read-only now; make it writable"
            if error.errno in (errno.ENOENT, errno.ESTALE) and not folder.is_dir():
                return f"{folder} was deleted while it was in use; keep it"
            if error.errno == errno.EIO:
                return f"The disk of {folder} fails ({error.strerror}); look after it"
            if error.errno in (errno.EACCES, errno.EPERM) and str(error.filename).startswith(str(folder)):
                return f"{folder} may not be written ({error.strerror}); make it writable"
        error = error.__context__
    return None
