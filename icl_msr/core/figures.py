"""Figures of images, and text in figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from icl_msr.core.storage import read_arrays, replacing

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Images = NDArray[np.uint8]
    """Images (n, H, W, 3)."""
    Maps = NDArray[np.floating[Any]]
    """Maps (n, h, w) with values from 0 to 1. They are enlarged smoothly if they are smaller than the images."""


def plain(text: str) -> str:
    """Return text that matplotlib draws literally: a dollar would start mathematics, and legends skip `_names`."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


@dataclass(frozen=True)
class Overlays:
    """Maps over some images, in a file of a run's folder, so that a summary can show those of several encoders."""

    images: "Images"
    masks: "NDArray[np.bool_]"
    """(n, H, W), true on the object."""
    maps: "Mapping[str, Mapping[str, Maps]]"
    """Maps by their method, such as `Grad-CAM`, and by encoder."""

    FILE = "overlays.npz"

    def save(self, folder: Path, advice: str) -> None:
        """Write the file into a folder; `advice` says what to do if the disk is full."""
        import numpy as np

        arrays = {f"{kind}/{encoder}": maps for kind, found in self.maps.items() for encoder, maps in found.items()}
        with replacing(folder / self.FILE, advice) as whole:
            np.savez_compressed(whole, images=self.images, masks=self.masks, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the file of a folder.

        Raises:
            FileNotFoundError: there is none.
        """
        arrays = read_arrays(folder / cls.FILE)
        maps: dict[str, dict[str, Any]] = {}
        for name, found in arrays.items():
            kind, _, encoder = name.partition("/")
            if encoder:
                maps.setdefault(kind, {})[encoder] = found
        return cls(arrays["images"], arrays["masks"], maps)


def grid(
    rows: "Mapping[str, Images | tuple[Images, Maps]]",
    *,
    marks: "Mapping[str, NDArray[np.bool_]] | None" = None,
    outlines: "NDArray[np.bool_] | None" = None,
) -> "Figure":
    """Draw a row per name and a column per image. A pair of images and maps is drawn as an overlay.

    `marks` (n,) by name gives images a green frame if true, else a grey one. `outlines` (n, H, W) are masks whose
    outline is drawn on every image.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = max(len(row[0] if isinstance(row, tuple) else row) for row in rows.values())
    margin = max(1.1, 0.075 * max(map(len, rows)) + 0.15)
    size = (columns * 0.9 + margin, len(rows) * 0.93)
    figure = Figure(figsize=size, dpi=110)
    axes = figure.add_axes(
        (margin / size[0], 0.01, 0.995 - margin / size[0], 0.98)
    )  # one Axes for all images: one for each would take a second
    axes.set_axis_off()
    for line, (name, row) in enumerate(rows.items()):
        axes.text(-0.09, line + 0.5, plain(name), ha="right", va="center", fontsize=9)
        images, maps = row if isinstance(row, tuple) else (row, None)
        for column, image in enumerate(images):
            place = (column + 0.03, column + 0.97, line + 0.97, line + 0.03)
            if maps is None:
                axes.imshow(image, extent=place)
            else:
                smooth = None if maps[column].shape == image.shape[:2] else "bicubic"
                shown: Any = {"cmap": "inferno", "alpha": 0.6, "vmin": 0, "vmax": 1, "interpolation": smooth}
                axes.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255, extent=place)
                axes.imshow(maps[column], extent=place, **shown)
            if outlines is not None and outlines[column].any() and not outlines[column].all():
                turned = (*place[:2], place[3], place[2])  # `contour` has no origin at the top
                axes.contour(outlines[column], [0.5], extent=turned, colors="#35e0c0", linewidths=0.8)
            if marks and name in marks:
                colour = "#009e73" if marks[name][column] else "#bbbbbb"
                axes.add_patch(Rectangle((place[0], place[3]), 0.94, 0.94, fill=False, edgecolor=colour, linewidth=2))
    axes.set(xlim=(0, columns), ylim=(len(rows), 0), aspect="auto")
    return figure
