"""Millions of names in little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from typing_extensions import override

_TOGETHER = 4096
"""Names that are decoded at a time."""


class Names(Sequence[str]):
    """Strings in one array of bytes.

    A list of ten million paths takes more than a gigabyte, and every worker copies it while it reads. This takes the
    paths' letters and eight bytes for each, and workers share it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        letters, ends = bytearray(), array("q")
        for name in names:
            letters += name.encode(errors="surrogatepass")
            ends.append(len(letters))
        self._letters, self._ends = np.frombuffer(letters, np.uint8), np.frombuffer(ends, np.int64)

    @override
    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    @override
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            start, stop, step = i.indices(len(self))
            return self._between(start, stop) if step == 1 else [self[j] for j in range(start, stop, step)]
        if not -len(self) <= i < len(self):
            raise IndexError(f"There are {len(self)} names, and none at {i}.")
        return self._between(i % len(self), i % len(self) + 1)[0]

    @override
    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _TOGETHER):
            yield from self._between(start, min(start + _TOGETHER, len(self)))

    def _between(self, start: int, stop: int) -> list[str]:
        if stop <= start:
            return []
        begin = int(self._ends[start - 1]) if start else 0
        letters = self._letters[begin : self._ends[stop - 1]].tobytes()
        ends = (self._ends[start:stop] - begin).tolist()
        begins = [0, *ends[:-1]]
        return [letters[a:b].decode(errors="surrogatepass") for a, b in zip(begins, ends, strict=True)]


def compact(names: Sequence[str]) -> Sequence[str]:
    """Return a list of names as `Names`, and any other sequence as it is."""
    return Names(names) if isinstance(names, list | tuple) else names
