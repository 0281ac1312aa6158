"""Negatives from a folder of textures that were made before, by `python -m icl_msr.textures` or by another program."""

import os
from collections import Counter
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveFloat

from icl_msr.core.errors import UserError
from icl_msr.core.views import AlphaMode, AlphaSchedule
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.files import FileSplit


class CachedNegatives:
    """One texture an image, which is cropped, flipped and coloured as the query is.

    The folder has the training images' own classes and names: `<folder>/train/<class>/<stem>.png`, or without `train`,
    as the textures of Ge et al. 2021 have beside ImageNet.
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
        self.folder = Path(folder).expanduser()
        # What the losses read; see `icl_msr.core.views.NonSemantic`.
        self.alpha, self.alpha_mode, self.alpha_schedule = alpha, alpha_mode, alpha_schedule
        self.repulsion = repulsion

    def open(self, dataset: Dataset) -> Split:
        """The texture of each training image, in their order; in memory where the images are.

        Raises:
            UserError: there is no such folder, or it lacks some of them.
        """
        if not self.folder.is_dir():
            raise UserError(
                f"There is no folder {self.folder}; set negatives.folder to a folder of textures, or write one with "
                f"python -m icl_msr.textures --to {self.folder} and the same dataset=..."
            )
        base = self.folder / "train" if (self.folder / "train").is_dir() else self.folder
        there = {os.path.join(where, name) for where, _, names in os.walk(base) for name in names}
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
    """`<class>/<stem>.png` for each training image; its number takes the place of a stem where there are no files.

    Raises:
        UserError: two images have the same name.
    """
    train = dataset.train
    classes = [dataset.classes[k].replace("/", "_") if k >= 0 else "unlabelled" for k in train.labels.tolist()]
    files = train.files if isinstance(train, ArraySplit | FileSplit) else None
    if files is None:
        return [f"{name}/{i:08d}.png" for i, name in enumerate(classes)]
    names = [_below(Path(file), name) for file, name in zip(files, classes, strict=True)]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} training images share the texture {name}; rename them, so that their stems differ.")
    return names


def _below(file: Path, folder: str) -> str:
    """The path from the class folder on, with folders in it that it may have."""
    path = file.with_suffix(".png")
    above = next((parent for parent in path.parents if parent.name == folder), path.parent)
    return f"{folder}/{path.relative_to(above).as_posix()}"
