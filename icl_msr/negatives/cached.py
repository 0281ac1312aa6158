"""Negatives from a folder of textures that `python -m icl_msr.textures` or another program wrote."""

import re
from collections import Counter
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveFloat

from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded
from icl_msr.core.views import AlphaMode, AlphaSchedule
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.files import FileSplit
from icl_msr.data.listing import Listing


class CachedNegatives:
    """One texture per image, cropped, flipped and coloured as the query is.

    The folder has the classes and names of the training images: `<folder>/train/<class>/<stem>.png`. `train` may be
    left out, as in the ImageNet textures of Ge et al. 2021.
    """

    def __init__(
        self,
        *,
        folder: str,
        alpha: PositiveFloat,
        alpha_mode: AlphaMode,
        alpha_schedule: AlphaSchedule,
        repulsion: NonNegativeFloat,
    ) -> None:
        self.folder = expanded(folder)
        # The losses read these; see `icl_msr.core.views.NonSemantic`.
        self.alpha, self.alpha_mode, self.alpha_schedule = alpha, alpha_mode, alpha_schedule
        self.repulsion = repulsion

    def open(self, dataset: Dataset) -> Split:
        """Return the textures of the training images, in the same order. They are in memory if the images are.

        Raises:
            UserError: the folder does not exist, or lacks some textures.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"There is no folder {self.folder}; set negatives.folder to a folder of textures, or write one with "
                f"python -m icl_msr.textures --to {self.folder} and the same dataset=..."
            )
        base = self.folder / "train" if (self.folder / "train").is_dir() else self.folder
        there = set(Listing(base, follow_links=True).below(base))
        files = [str(base / name) for name in texture_names(dataset)]
        missing = [file for file in files if file not in there]
        if missing:
            raise UserError(
                f"{self.folder} has no texture for {len(missing)} of the {len(files)} training images, the first is "
                f"{missing[0]}; write what is missing with python -m icl_msr.textures --to {self.folder} and the same "
                "dataset=..."
            )
        textures = FileSplit(files, dataset.train.labels, dataset.image_size)
        return textures.in_memory() if isinstance(dataset.train, ArraySplit) else textures


def texture_names(dataset: Dataset) -> list[str]:
    """Return `<class>/<stem>.png` of each training image. An image without a file has its number in place of the stem.

    Raises:
        UserError: two images have the same name.
    """
    train = dataset.train
    folders = [re.sub(r"^\.+|[/\0]", "_", name) for name in dataset.classes]  # none that leads elsewhere, or is hidden
    classes = [folders[k] if k >= 0 else "unlabelled" for k in train.labels.tolist()]
    files = train.files if isinstance(train, ArraySplit | FileSplit) else None
    if files is None:
        return [f"{name}/{i:08d}.png" for i, name in enumerate(classes)]
    names = [_below(Path(file), name) for file, name in zip(files, classes, strict=True)]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} training images share the texture {name}; rename them, so that their stems differ.")
    return names


def _below(file: Path, folder: str) -> str:
    """Return the path from the class folder on, including folders inside it."""
    path = file.with_suffix(".png")
    above = next((parent for parent in path.parents if parent.name == folder), path.parent)
    return f"{folder}/{path.relative_to(above).as_posix()}"
