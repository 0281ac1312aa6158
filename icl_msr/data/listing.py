"""Find the images and folders below a folder, and count the entries that are skipped."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from icl_msr.core.errors import UserError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".avif"),
    *(".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of image files, in lower case."""

LITTER = (
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "network trash folder", "temporary items", "__macosx", "__pycache__"),
)
"""Folders that file managers, disks and archives leave behind, in lower case."""

_UNSEEN = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".ds_store")  # such files are not even counted


class Listing:
    """The images and folders below a root.

    At every depth it skips hidden files and folders, litter, links that lead out of the root, entries that are neither
    file nor folder, and files without the suffix of an image. `sentence` says how many.

    Args:
        root: the folder.
        follow_links: true also reads links that lead out of the root.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.root, self.follow_links = root, follow_links
        self._inside = os.path.realpath(root)
        self._passed: dict[str, str] = {}
        """The reason for each skipped entry, by its path."""

    def folders(self, folder: Path) -> list[Path]:
        """Return the folders in a folder, sorted."""
        return sorted(Path(entry.path) for entry in self._entries(folder) if entry.is_dir())

    def here(self, folder: Path) -> list[str]:
        """Return the image files that lie in the folder itself, sorted."""
        return sorted(entry.path for entry in self._entries(folder) if entry.is_file() and _suffix(entry) in SUFFIXES)

    def beside(self, folder: Path) -> None:
        """Count the image files in the folder itself as skipped."""
        self._passed |= dict.fromkeys(self.here(folder), "images beside the class folders")

    def below(self, folder: Path) -> list[str]:
        """Return the image files at any depth below a folder, sorted by their paths."""
        found: list[str] = []
        waiting: list[tuple[str, tuple[str, ...]]] = [(str(folder), (os.path.realpath(folder),))]
        while waiting:
            here, above = waiting.pop()
            for entry in self._entries(here):
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if any(os.path.join(other, "").startswith(os.path.join(real, "")) for other in above):
                        self._passed[entry.path] = "links to a folder above"
                    else:
                        waiting.append((entry.path, (*above, real)))
                elif self._is_image(entry):
                    found.append(entry.path)
        return sorted(found)

    @property
    def sentence(self) -> str:
        """One sentence about the entries skipped so far; empty if there are none."""
        if not self._passed:
            return ""
        counts = Counter(self._passed.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        way_out = "; dataset.follow_links=true reads what the links lead to" if _OUT in counts else ""
        return f"Passed over in {self.root}: {kinds}{way_out}."

    def _entries(self, folder: str | Path) -> Iterator["os.DirEntry[str]"]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower() in _UNSEEN:
                    continue
                kind = self._passed_over(entry)
                if kind is None:
                    yield entry
                else:
                    self._passed[entry.path] = kind

    def _passed_over(self, entry: "os.DirEntry[str]") -> str | None:
        """Return the reason to skip an entry; None for folders and files that are read."""
        if entry.name.startswith("."):
            return "hidden"
        if entry.name.lower() in LITTER:
            return f"litter ({entry.name})"
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if not os.path.exists(real):
                return "broken links"
            inside = real == self._inside or real.startswith(os.path.join(self._inside, ""))
            if not inside and not self.follow_links:
                return _OUT
        return None if entry.is_dir() or entry.is_file() else "neither files nor folders"

    def _is_image(self, entry: "os.DirEntry[str]") -> bool:
        if (suffix := _suffix(entry)) in SUFFIXES:
            return True
        self._passed[entry.path] = f"{suffix or 'suffixless'} files"
        return False


def named_file(folder: Path, name: str, table: Path) -> str:
    """Return the path of an image in a folder, by the name that a table gives it.

    Raises:
        UserError: there is no such file, or the name or a link leads out of the folder.
    """
    path = os.path.join(folder, name)
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{table} names {name}, which leads out of {folder}; correct it.")
    if not os.path.isfile(path):
        raise UserError(f"There is no image {path}, which {table} names; put it there, or take it out of the table.")
    if os.path.islink(path) and not os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
        raise UserError(f"{path} is a link that leads out of {folder}; put the image in its place.")
    return path


def _suffix(entry: "os.DirEntry[str]") -> str:
    return os.path.splitext(entry.name)[1].lower()


_OUT = "links that lead out of it"


def is_number(word: str) -> bool:
    """Return whether a word of a file is a whole number that can be an index or a class: nine digits at most."""
    return re.fullmatch(r"\d{1,9}", word) is not None
