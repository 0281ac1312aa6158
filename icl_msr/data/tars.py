"""Shards: tar files in the layout of WebDataset, and an index of what lies where in each.

A sample is a run of members with one key: `00000017.jpg`, `00000017.cls`, `00000017.json`. The key is the path up to
the first dot of the last name. A tar can come from anybody. So it is only ever read at offsets, its names are only
names, and nothing in it is unpickled, linked or unpacked.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from icl_msr.core.errors import UserError, reason
from icl_msr.data.listing import LITTER

Read = Callable[[int, int], bytes]
"""Returns the bytes of a file from an offset on, so many of them; fewer at its end."""

SUFFIX = ".index"
"""What the name of an index has more than the name of its tar."""

LARGEST_INDEX = 1 << 28
"""Largest size of an index, in bytes."""

LARGEST_TEXT = 1 << 16
"""Largest size of a label or a JSON member that the index repeats, in bytes."""

_FORMAT = "icl-msr index 1"
_TEXTS = ("cls", "json", "txt")
"""Last suffixes of the members that the index repeats."""

_HEADER = 1 << 20  # largest header of a member, in bytes: names and extended attributes
_BUFFER = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass
class Sample:
    """What lies where in a tar for one key."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size of each member in bytes, by its suffix, such as `jpg` or `mask.png`."""
    texts: dict[str, str] = field(default_factory=dict)
    """The content of small members, by suffix."""


def write(file: IO[bytes], samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """Write samples to a tar, each a key and the content of its members by suffix, and return the content of its index.

    Equal samples give equal bytes: there are no times, owners or rights of files.
    """
    found: list[Sample] = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            sample = Sample(key)
            for suffix, content in members.items():
                about = tarfile.TarInfo(f"{key}.{suffix}")
                about.size, about.mtime, about.mode = len(content), 0, 0o644
                sample.members[suffix] = (tar.offset + _BLOCK, len(content))
                tar.addfile(about, io.BytesIO(content))
                if _is_text(suffix, len(content)):
                    sample.texts[suffix] = content.decode()
            found.append(sample)
    return _index(file.tell(), found)


def scan(read: Read, size: int, name: str) -> bytes:
    """Return the content of an index of a tar of `size` bytes.

    Raises:
        UserError: the tar is compressed, damaged or cut short, or holds links, a name that leads elsewhere, or two
            members of one name.
    """
    try:
        return _index(size, _samples(read, size, name))
    except UserError:
        raise
    except Exception as error:  # a damaged header can raise almost anything
        raise _refused(name, f"is not a tar that can be read ({reason(error)})") from None


def parse(content: bytes, size: int) -> list[Sample] | None:
    """Return the samples of an index; None if it is not an index of a tar of `size` bytes."""
    try:
        index = json.loads(content)
        if index["format"] != _FORMAT or index["bytes"] != size:
            return None
        found = [Sample(str(key), dict(members), dict(texts)) for key, members, texts in index["samples"]]
        for sample in found:
            for suffix, (offset, length) in sample.members.items():
                if not (type(offset) is type(length) is int and 0 <= offset <= offset + length <= size):
                    return None
                _check_name(f"{sample.key}.{suffix}")
            if not all(isinstance(text, str) for text in sample.texts.values()):
                return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found


def _index(size: int, samples: list[Sample]) -> bytes:
    rows = [[sample.key, sample.members, sample.texts] for sample in samples]
    return json.dumps({"format": _FORMAT, "bytes": size, "samples": rows}, separators=(",", ":")).encode()


def _samples(read: Read, size: int, name: str) -> list[Sample]:
    found: dict[str, Sample] = {}
    last = ""
    file = _Bounded(_Raw(read, size), _BUFFER)
    if file.peek(2)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
        raise _refused(name, "is compressed, so that nothing in it can be read by itself; unpack the compression,")
    with tarfile.open(fileobj=file, mode="r:") as tar:
        before = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            end = member.offset_data + member.size
            if member.size < 0 or end > size or tar.offset <= before:
                raise _refused(name, f"is cut short or damaged at {member.name!r}")
            before = tar.offset
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                kind = "a link" if member.issym() or member.islnk() else "not a regular file"
                raise _refused(name, f"holds {member.name!r}, which is {kind}")
            _check_name(member.name, name)
            folder, _, base = member.name.rpartition("/")
            if base.startswith(".") or any(part.lower() in LITTER for part in folder.split("/")):
                continue
            stem, _, suffix = base.partition(".")
            key, suffix = f"{folder}/{stem}".lstrip("/"), suffix.lower()
            if key != last and key in found:
                raise _refused(name, f"holds the sample {key!r} in two places")
            sample, last = found.setdefault(key, Sample(key)), key
            if suffix in sample.members:
                raise _refused(name, f"holds {member.name!r} twice")
            sample.members[suffix] = (member.offset_data, member.size)
            if _is_text(suffix, member.size):
                sample.texts[suffix] = read(member.offset_data, member.size).decode(errors="replace")
        if (after := read(tar.offset, _BLOCK)) != b"\0" * _BLOCK:
            raise _refused(name, "is cut short" if len(after) < _BLOCK else f"is damaged at byte {tar.offset}")
    return list(found.values())


def _is_text(suffix: str, size: int) -> bool:
    return suffix.rpartition(".")[2] in _TEXTS and size <= LARGEST_TEXT


def _check_name(member: str, tar: str = "The index") -> None:
    if member.startswith("/") or ".." in member.split("/") or _CONTROL.search(member) or len(member) > 1024:
        raise _refused(tar, f"holds the name {member[:80]!r}, which leads elsewhere or cannot be shown")


def _refused(name: str, why: str) -> UserError:
    return UserError(f"{name} {why}; take it out of the set, or write it anew.")


class _Raw(io.RawIOBase):
    """A file that is read by ranges."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        length = min(len(buffer), max(0, self._size - self._at))
        content = self._read(self._at, length) if length else b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _Bounded(io.BufferedReader):
    """A buffered file that refuses to read much at once, since `tarfile` reads headers of any size into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _HEADER:
            raise ValueError("a header of unreasonable size")
        return super().read(size)
