"""Read ranges of files: below a folder, or below the URL of a store, with a cache of pages that processes share."""

import fcntl
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from icl_msr.core.errors import UserError, reason
from icl_msr.core.storage import expanded

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp", "hf": "huggingface_hub"}
"""The stores that can be read, and the package of each beside `fsspec`."""

PAGE = 1 << 21
"""Bytes of a store that are fetched and kept together."""

_TOGETHER = 16  # pages that are fetched at once
_PAGE_NAME = re.compile(r"[0-9a-f]{40}")
_STALE = 3600.0  # seconds after which the unfinished file of a killed process may go


@dataclass(frozen=True)
class Entry:
    """A file of a store."""

    name: str
    """The path below the folder or URL."""
    size: int
    """Bytes."""
    version: str
    """A text that changes when the content does."""


def is_url(place: str) -> bool:
    """Return whether a place is the URL of a store, not a folder."""
    return "://" in place


class Store:
    """The files below a folder or a URL.

    Objects may be used after a fork, since each process has a connection of its own.

    Args:
        place: the folder, or `s3://`, `gs://`, `https://` or `hf://`.
        options: arguments of the file system of `fsspec`, such as `anon`.
        cache: the pages of remote files that are kept; None keeps none.

        Raises:
            UserError: the kind of URL is not known, or its package is missing.
    """

    def __init__(self, place: str, options: Mapping[str, Any] | None = None, cache: "Cache | None" = None) -> None:
        self.place, self.options, self.cache = place.rstrip("/"), dict(options or {}), cache
        self.remote = is_url(place)
        self._connection: tuple[int, Any, Any] | None = None
        if self.remote:
            protocol = place.partition("://")[0]
            if protocol not in PACKAGES:
                raise UserError(f"{place} cannot be read; name a folder, or a URL of {', '.join(PACKAGES)}.")
            self._connect()
        else:
            self.place = str(expanded(place))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def entries(self, names: Sequence[str] | None = None) -> list[Entry]:
        """Return the files of these names, or all files at any depth, sorted by name.

        Raises:
            UserError: a named file is not there, or the place cannot be listed.
        """
        if self.remote:
            return self._remote_entries(names)
        root = Path(self.place)
        if not root.is_dir():
            raise UserError(f"There is no folder {root}; set dataset.url to a folder of shards.")
        found = [path for path in root.rglob("*") if path.is_file()] if names is None else [root / n for n in names]
        result = []
        for path in found:
            with self._explained(path.name):
                about = path.stat()
            result.append(Entry(path.relative_to(root).as_posix(), about.st_size, str(about.st_mtime_ns)))
        return sorted(result, key=lambda entry: entry.name)

    def load(self, name: str, largest: int) -> bytes | None:
        """Return the content of a small file; None if it is not there.

        Raises:
            UserError: it is larger than `largest` bytes, or cannot be read.
        """
        try:
            if not self.remote:
                with open(self.path(name), "rb") as file:
                    content = file.read(largest + 1)
            else:
                content = self._fs.cat_file(self.path(name), start=0, end=largest + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            raise self._error(name, error) from error
        if len(content) > largest:
            raise UserError(
                f"{self.path(name)} is larger than {largest / 1e6:g} MB, as no such file is; write it anew."
            )
        return bytes(content)

    def save(self, name: str, content: bytes | Path) -> None:
        """Write a file, or put a copy of a local one there, whole or not at all.

        Raises:
            OSError: it cannot be written; stores raise errors of other kinds too.
        """
        if self.remote:
            if isinstance(content, Path):
                self._fs.put_file(str(content), self.path(name))
            else:
                self._fs.pipe_file(self.path(name), content)
            return
        put_whole(Path(self.path(name)), content if isinstance(content, bytes) else content.read_bytes())

    def read(self, entry: Entry, offset: int, length: int) -> bytes:
        """Return `length` bytes of a file from `offset` on.

        Raises:
            UserError: the file has fewer, or cannot be read.
        """
        if offset + length > entry.size:
            raise UserError(f"{self.path(entry.name)} is shorter than its index says; write the shard anew.")
        if not length:
            return b""
        if not self.remote:
            with self._explained(entry.name), open(self.path(entry.name), "rb", buffering=0) as file:
                content = os.pread(file.fileno(), length, offset)
                if len(content) < length:
                    raise EOFError("it is cut short")
                return content
        if self.cache is None:
            return self._fetch([(entry, offset, offset + length)])[0]
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        parts = [
            self._page(entry, page, max(0, offset - page * PAGE), offset + length) for page in range(first, last + 1)
        ]
        return b"".join(parts)

    def prepare(self, ranges: Sequence[tuple[Entry, int, int]]) -> None:
        """Fetch the pages of ranges (file, offset, length) that the cache lacks, several at once."""
        if not self.remote or self.cache is None:
            return
        wanted = {
            (entry, page): None
            for entry, offset, length in ranges
            if length
            for page in range(offset // PAGE, (offset + length - 1) // PAGE + 1)
        }
        pages = list(wanted)[: max(1, self.cache.limit // PAGE // 2)]
        random.Random(os.getpid()).shuffle(pages)  # so that processes which need the same pages share the work
        for start in range(0, len(pages), _TOGETHER):
            missing = [
                (entry, page) for entry, page in pages[start : start + _TOGETHER] if not self._cached(entry, page)
            ]
            if missing:
                parts = [(entry, page * PAGE, min(entry.size, (page + 1) * PAGE)) for entry, page in missing]
                for (entry, page), content in zip(missing, self._fetch(parts), strict=True):
                    self.cache.put(self._key(entry, page), content)

    def path(self, name: str) -> str:
        """Return the whole path or URL of a file."""
        return f"{self.place}/{name}"

    def _page(self, entry: Entry, page: int, low: int, end: int) -> bytes:
        """Return the bytes of a page from `low` on, up to the byte `end` of the file at most."""
        assert self.cache is not None
        whole = min(entry.size, (page + 1) * PAGE) - page * PAGE
        high = min(whole, end - page * PAGE)
        key = self._key(entry, page)
        content = self.cache.get(key, whole, low, high)
        if content is not None:
            return content
        with self._lock:  # threads of this process wait for one another
            content = self.cache.get(key, whole, low, high)
            if content is None:
                fetched = self._fetch([(entry, page * PAGE, page * PAGE + whole)])[0]
                self.cache.put(key, fetched)
                content = fetched[low:high]
        return content

    def _cached(self, entry: Entry, page: int) -> bool:
        assert self.cache is not None
        return self.cache.has(self._key(entry, page), min(entry.size, (page + 1) * PAGE) - page * PAGE)

    def _key(self, entry: Entry, page: int) -> str:
        text = "\0".join([self.place, entry.name, str(entry.size), entry.version, str(page), str(PAGE)])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:40]

    def _fetch(self, ranges: Sequence[tuple[Entry, int, int]]) -> list[bytes]:
        """Return the bytes from `start` to `end` of each (file, start, end), fetched at once."""
        paths, starts, ends = zip(*((self.path(entry.name), start, end) for entry, start, end in ranges), strict=True)
        with self._explained(ranges[0][0].name):
            found: list[bytes] = self._fs.cat_ranges(list(paths), list(starts), list(ends), on_error="raise")
        for content, (entry, start, end) in zip(found, ranges, strict=True):
            if len(content) != end - start:
                raise self._error(entry.name, EOFError("it is shorter than it was, or the server knows no ranges"))
        return found

    def _remote_entries(self, names: Sequence[str] | None) -> list[Entry]:
        with self._explained(""):
            if names is not None and self.place.startswith("http"):  # which cannot be listed
                with ThreadPoolExecutor(_TOGETHER) as pool:
                    about = dict(zip(names, pool.map(self._info, names), strict=True))
            else:
                root = self._fs._strip_protocol(self.place).rstrip("/")
                found = self._fs.find(self.place, detail=True)
                about = {path.removeprefix(root).lstrip("/"): facts for path, facts in found.items()}
        if missing := next((name for name in names or () if name not in about), None):
            raise self._error(missing, FileNotFoundError())
        about = about if names is None else {name: about[name] for name in names}
        result = []
        for name, facts in about.items():
            known = (facts.get(key) for key in ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified"))
            version = next((str(value) for value in known if value), "")
            if facts.get("size") is None:
                raise UserError(f"{self.path(name)} has no known size, so it cannot be read by ranges; copy it first.")
            result.append(Entry(name, int(facts["size"]), version))
        return sorted(result, key=lambda entry: entry.name)

    def _info(self, name: str) -> dict[str, Any]:
        with self._explained(name):
            return dict(self._fs.info(self.path(name)))

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn errors of a file system into a `UserError`. A store can raise almost anything."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: Exception) -> UserError:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else reason(error)
        return UserError(
            f"{self.path(name).rstrip('/')} cannot be read ({why}); check dataset.url and your access to it, "
            "and repeat the command."
        )

    @property
    def _fs(self) -> Any:
        """The file system of this process."""
        return self._connect()[1]

    @property
    def _lock(self) -> Any:
        return self._connect()[2]

    def _connect(self) -> tuple[int, Any, Any]:
        if self._connection is None or self._connection[0] != os.getpid():
            protocol = self.place.partition("://")[0]
            for chatty in ("aiobotocore", "botocore"):  # they tell where they found the keys
                logging.getLogger(chatty).setLevel(logging.WARNING)
            try:
                fs = import_module("fsspec").filesystem(protocol, skip_instance_cache=True, **self.options)
            except ImportError:
                package = "'icl-msr[shards]'" if protocol in ("s3", "https", "http") else PACKAGES[protocol]
                raise UserError(
                    f"{self.place} needs the package {PACKAGES[protocol]}; type pip install {package}."
                ) from None
            except (TypeError, ValueError) as error:
                raise UserError(f"{self.place} cannot be opened with dataset.options ({reason(error)}).") from None
            self._connection = (os.getpid(), fs, threading.Lock())
        return self._connection


class Cache:
    """Pages of remote files in a folder, at most `limit` bytes together, shared by the processes of a machine.

    A page is a file whose name is a hash, so that no name of a store or a tar can lead out of the folder. A file is
    there whole or not at all. When there are too many, the oldest go.

    Args:
        folder: the folder. It is made when it is needed.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def get(self, key: str, whole: int, low: int, high: int) -> bytes | None:
        """Return the bytes `low` to `high` of a page of `whole` bytes; None if it is not there."""
        try:
            with open(self.folder / key, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != whole:
                    return None
                return os.pread(file.fileno(), high - low, low)
        except OSError:
            return None

    def has(self, key: str, whole: int) -> bool:
        """Return whether a page of `whole` bytes is there."""
        try:
            return os.stat(self.folder / key).st_size == whole
        except OSError:
            return False

    def put(self, key: str, content: bytes) -> None:
        """Keep a page, and remove the oldest ones if there are too many.

        Raises:
            UserError: the folder cannot be written.
        """
        if len(content) > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._ledger() as ledger:
                if self.has(key, len(content)):
                    return
                used = int(ledger.read() or self._pages()[1])
                if used + len(content) > self.limit:
                    used = self._evict(self.limit - max(len(content), self.limit // 10))
                put_whole(self.folder / key, content)
                ledger.seek(0)
                ledger.truncate()
                ledger.write(str(used + len(content)))
        except OSError as error:
            why = reason(error)
            raise UserError(
                f"The cache {self.folder} cannot be written ({why}); free space, set dataset.cache_gb lower, or "
                "dataset.cache to another folder."
            ) from None

    @contextmanager
    def _ledger(self) -> Iterator[Any]:
        """Open the file that says how many bytes are kept, for this process alone."""
        number = os.open(self.folder / "ledger", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with open(number, "r+") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield file

    def _evict(self, limit: int) -> int:
        """Remove the oldest pages until `limit` bytes are left. Return the bytes that are left."""
        pages, used = self._pages()
        for _, size, path in sorted(pages):
            if used <= limit:
                break
            with suppress(OSError):
                os.unlink(path)
            used -= size
        return used

    def _pages(self) -> tuple[list[tuple[float, int, str]], int]:
        """Return the time, the size and the path of each page, and the bytes of all."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    if _PAGE_NAME.fullmatch(entry.name):
                        found.append((about.st_mtime, about.st_size, entry.path))
                    elif entry.name.endswith(".tmp") and time.time() - about.st_mtime > _STALE:
                        os.unlink(entry.path)
        return found, sum(size for _, size, _ in found)


def put_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Several processes may write the same file at once, if it has the same content.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
