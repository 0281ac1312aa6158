"""The place of the object in each image of a folder, from a table of boxes or a folder of masks."""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import torch
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.storage import readable
from icl_msr.data.listing import Listing

BoxesOf = Literal["refuse", "largest", "union"]
"""Treatment of several boxes of one image: an error, the largest of them, or the box around all."""

Box = tuple[int, int, int, int]


class Objects:
    """The boxes or masks of the images below a folder.

    Args:
        base: the folder. The next two are absolute paths or paths in it.
        boxes: a table of boxes; see `folders.imagefolder`.
        masks: a folder of masks.
        boxes_of: the treatment of several boxes of one image.
        follow_links: true also reads links that lead out of the folder of masks.
    """

    def __init__(
        self, base: Path, boxes: str | None, masks: str | None, boxes_of: BoxesOf, *, follow_links: bool = False
    ) -> None:
        if boxes is not None and masks is not None:
            raise UserError("dataset.boxes and dataset.masks are both set; keep one and set the other to null.")
        self.base, self.boxes, self.boxes_of = base, boxes, boxes_of
        self.table = None if boxes is None else _read_boxes(base / boxes)
        self.unused = set(self.table or ())
        """The rows that no image has used yet."""
        self.masks = None if masks is None else base / masks
        if self.masks is not None and not self.masks.is_dir():
            raise UserError(f"There is no folder {self.masks}; set dataset.masks to the folder of masks, or to null.")
        self._listing = None if self.masks is None else Listing(self.masks, follow_links=follow_links)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for file in [] if self._listing is None else self._listing.below(self._listing.root):
            self._by_stem[os.path.splitext(file)[0]].append(file)

    @property
    def known(self) -> bool:
        """True if there are boxes or masks."""
        return self.table is not None or self.masks is not None

    def of(
        self, splits: Sequence[str], files: Sequence[str], classes: Sequence[str], places: Sequence[str]
    ) -> tuple[Tensor | None, list[str] | None]:
        """Return boxes (N, 4) and mask files (N) of a folder's images, each None if there are none.

        Args:
            splits: the names that the table may use for the folder, the most exact one first.
            files: the images (N).
            classes: their classes (N).
            places: their paths below the class folder (N), with `/`.

            Raises:
                UserError: an image has no box or mask, or its box or mask is ambiguous.
        """
        if self.table is not None:
            times = Counter((name, Path(place).name) for name, place in zip(classes, places, strict=True))
            found = []
            for file, name, place in zip(files, classes, places, strict=True):
                alone = times[name, Path(place).name] == 1
                found.append(self._box(splits, file, name, place, alone=alone))
            return torch.tensor(found), None
        if self.masks is not None:
            masks = [self._mask(file) for file in files]
            mask, count = Counter(masks).most_common(1)[0]
            if count > 1:
                sharing = [file for file, of in zip(files, masks, strict=True) if of == mask]
                raise UserError(f"{sharing[0]} and {sharing[1]} would share the mask {mask}; rename one of them.")
            return None, masks
        return None, None

    @property
    def sentence(self) -> str:
        """One sentence about the rows of the table without an image; empty if all rows are used."""
        if not self.unused:
            return ""
        _, name, file = min(self.unused, key=str)
        return f"{self.boxes} has boxes of {len(self.unused)} images that are not there, such as {name}/{file}."

    def _box(self, splits: Sequence[str], file: str, name: str, place: str, *, alone: bool) -> Box:
        assert self.table is not None
        last = Path(place).name
        for split in (*splits, None):
            key = (split, name, place)
            if key not in self.table and (split, name, last) in self.table:
                if not alone:
                    raise UserError(
                        f"{self.boxes} has a box for {last} of class {name}, which has several images of that name; "
                        f"write the paths below the class folder, as in {place}."
                    )
                key = (split, name, last)
            if key in self.table:
                self.unused.discard(key)
                return self._one(list(dict.fromkeys(self.table[key])), file)
        raise UserError(f"{self.boxes} has no box for {file} (split {splits[-1]}, class {name}); add one.")

    def _one(self, boxes: list[Box], file: str) -> Box:
        if len(boxes) > 1 and self.boxes_of == "refuse":
            raise UserError(
                f"{self.boxes} has {len(boxes)} boxes for {file}; keep one, or set dataset.boxes_of=largest or "
                "dataset.boxes_of=union."
            )
        if self.boxes_of == "union":
            x0, y0, x1, y1 = zip(*boxes, strict=True)
            return min(x0), min(y0), max(x1), max(y1)
        return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))

    def _mask(self, file: str) -> str:
        assert self.masks is not None
        assert self._listing is not None
        place = self.masks / Path(file).relative_to(self.base)
        found = self._by_stem[str(place.with_suffix(""))]
        if not found:
            skipped = self._listing.sentence
            raise UserError(f"{file} has no mask {place.with_suffix('.png')}; add one. {skipped}".rstrip())
        if len(found) > 1:
            raise UserError(f"{file} has the masks {' and '.join(found)}; keep one.")
        return found[0]


def _read_boxes(path: Path) -> dict[tuple[str | None, str, str], list[Box]]:
    """Return the boxes by split, class and file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; set dataset.boxes to the .csv file of boxes, or to null.")
    table: dict[tuple[str | None, str, str], list[Box]] = {}
    with readable(path, "correct it"), path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        columns = set(rows.fieldnames or [])
        name = "wnid" if "wnid" in columns else "class"
        missing = {name, "file", "xmin", "ymin", "xmax", "ymax"} - columns
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(sorted(missing))}; "
                "needed are wnid (or class), file, xmin, ymin, xmax, ymax."
            )
        for row in rows:
            try:
                x0, y0, x1, y1 = (int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            except (TypeError, ValueError):
                x0, y0, x1, y1 = 0, 0, -1, -1
            if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
                raise UserError(
                    f"Line {rows.line_num} of {path} is not a box: xmin, ymin, xmax, ymax must be integers with "
                    "0 <= xmin <= xmax and 0 <= ymin <= ymax."
                )
            key = (row.get("split"), normalize("NFC", row[name] or ""), (row["file"] or "").replace("\\", "/"))
            table.setdefault(key, []).append((x0, y0, x1 + 1, y1 + 1))
    return table
