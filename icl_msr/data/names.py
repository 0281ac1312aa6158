"""Millions of names in little memory."""

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from typing_extensions import override


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
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"There are {len(self)} names, and none at {i}.")
        at = i % len(self)
        letters = self._letters[self._ends[at - 1] if at else 0 : self._ends[at]]
        return letters.tobytes().decode(errors="surrogatepass")


def compact(names: Sequence[str]) -> Sequence[str]:
    """Return a list of names as `Names`, and any other sequence as it is."""
    return Names(names) if isinstance(names, list | tuple) else names
