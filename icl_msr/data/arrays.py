"""Images and labels from .npz files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from icl_msr.core.errors import UserError, reason
from icl_msr.core.storage import read_arrays
from icl_msr.data.dataset import ArraySplit, Dataset, numbered_classes
from icl_msr.data.sources import TrainOn, fit, fit_all, read_image, resident, stack

Arrays = dict[str, np.ndarray[Any, Any]]


def arrays(
    *, path: str | Annotated[list[str], Field(min_length=1)], image_size: PositiveInt | None, train_on: TrainOn
) -> Dataset:
    """Build a data set from one .npz file, or from several with a part of the arrays each. Pickles are not read.

    The arrays have one of three layouts. Each may also have `classes`, (K,) names.

    * Two sets: `train_images`, `test_images` uint8 (N, H, W, 3) or (N, 3, H, W); `train_labels`, `test_labels`
      integer (N,); optionally `train_masks`, `test_masks` (N, H, W), bool or uint8, not zero on the object.
    * One set: `images`, `labels`, optionally `masks`, and `is_train` bool (N,).
    * Compressed images: as one set, but with `blob` uint8 (B,) and `offsets` int64 (N + 1,) in place of `images`.
      Image i is the JPEG or PNG file `blob[offsets[i]:offsets[i + 1]]`.

    Labels count from 0, and -1 marks an unlabelled training image. `image_size` null keeps the size of square arrays.

    Raises:
        UserError: a file cannot be read, or an array is missing or has another type or shape.
    """
    paths = [path] if isinstance(path, str) else path
    found = _read(paths)
    where = ", ".join(paths)
    if "train_images" in found:
        parts = {split: _part(found, f"{split}_", where) for split in ("train", "test")}
    else:
        if "blob" in found:
            found["images"] = _decompress(found, image_size, where)
        whole = _part(found, "", where)
        is_train = _need(found, "is_train", where)
        if is_train.dtype != bool or is_train.shape != (len(whole["labels"]),):
            raise UserError(
                f"is_train in {where} is {is_train.dtype} {is_train.shape}; it must be bool ({len(whole['labels'])},)."
            )
        parts = {
            split: {key: value[chosen] for key, value in whole.items()}
            for split, chosen in (("train", is_train), ("test", ~is_train))
        }
    splits = {split: _split(part, split, image_size, where) for split, part in parts.items()}
    if splits["train"].images.shape[-1] != splits["test"].images.shape[-1]:
        raise UserError(f"Training and test images in {where} differ in size; set dataset.image_size.")
    classes = _classes(found, splits, where)
    return resident(Path(paths[0]).stem, classes, splits["train"], {"test": splits["test"]}, train_on)


def _read(paths: Sequence[str]) -> Arrays:
    found: Arrays = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"There is no file {path}; set dataset.path to an .npz file.")
        try:
            new = read_arrays(Path(path))
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise almost anything
            raise UserError(
                f"{path} cannot be read as .npz without pickles ({reason(error).partition('. ')[0]}); write it with "
                "numpy.savez(path, train_images=..., train_labels=..., test_images=..., test_labels=...)."
            ) from error
        twice = sorted(found.keys() & new.keys())
        twice = [key for key in twice if key != "classes" or found[key].tolist() != new[key].tolist()]
        if twice:
            raise UserError(f"{twice[0]} is in {path} and in another file of dataset.path; each key may stand once.")
        found |= new
    return found


def _need(found: Arrays, key: str, where: str) -> np.ndarray[Any, Any]:
    if key not in found:
        raise UserError(
            f"{where} has no array {key} (it has {', '.join(sorted(found)) or 'none'}); needed are train_images, "
            "train_labels, test_images, test_labels, or images (or blob, offsets), labels, is_train."
        )
    return found[key]


def _part(found: Arrays, prefix: str, where: str) -> Arrays:
    """Return images (N, 3, H, W), labels (N,) and masks (N, H, W), checked to fit each other."""
    images = _need(found, f"{prefix}images", where)
    labels = _need(found, f"{prefix}labels", where)
    if images.dtype != np.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise UserError(
            f"{prefix}images in {where} is {images.dtype} {images.shape}; "
            "it must be uint8 (N, H, W, 3) or (N, 3, H, W)."
        )
    if images.shape[3] == 3:
        images = images.transpose(0, 3, 1, 2)
    count, _, height, width = images.shape
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise UserError(
            f"{prefix}labels in {where} is {labels.dtype} {labels.shape}; it must be integers ({count},), "
            "one for each image."
        )
    part = {"images": images, "labels": labels.astype(np.int64)}
    if f"{prefix}masks" in found:
        masks = found[f"{prefix}masks"]
        if masks.dtype not in (bool, np.uint8) or masks.shape != (count, height, width):
            raise UserError(
                f"{prefix}masks in {where} is {masks.dtype} {masks.shape}; "
                f"it must be bool or uint8 ({count}, {height}, {width})."
            )
        part["masks"] = masks != 0
        covered = part["masks"].reshape(count, -1).mean(1)
        if ((covered == 0) | (covered == 1)).any():
            i = int(((covered == 0) | (covered == 1)).argmax())
            what = "is empty" if covered[i] == 0 else "covers the whole image"
            raise UserError(f"Mask {i} of {prefix}masks in {where} {what}, so it shows no object; correct it.")
    return part


def _split(part: Arrays, split: str, image_size: int | None, where: str) -> ArraySplit:
    height, width = part["images"].shape[2:]
    if len(part["images"]) == 0:
        raise UserError(f"{where} has no {split} images.")
    if image_size is None and height != width:
        raise UserError(
            f"The {split} images in {where} are {height} x {width} pixels; set dataset.image_size to cut them square."
        )
    size = image_size or height
    images, labels = torch.from_numpy(part["images"]), torch.from_numpy(part["labels"])
    masks = None
    if "masks" in part:
        masks = fit_all(torch.from_numpy(part["masks"]).byte(), size, nearest=True).bool()
    return ArraySplit(fit_all(images, size), labels, masks)


def _decompress(found: Arrays, image_size: int | None, where: str) -> np.ndarray[Any, Any]:
    blob, offsets = found["blob"], _need(found, "offsets", where)
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise UserError(f"blob in {where} is {blob.dtype} {blob.shape}; it must be uint8 (B,).")
    whole = offsets.ndim == 1 and len(offsets) > 1 and np.issubdtype(offsets.dtype, np.integer)
    if not whole or offsets[0] < 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(blob):
        raise UserError(
            f"offsets in {where} must be integers (N + 1,) that rise from 0 to at most {len(blob)}, the length of blob."
        )

    def load(i: int) -> Tensor:
        image = read_image(blob[offsets[i] : offsets[i + 1]].tobytes(), f"Image {i} of {where}")
        return image if image_size is None else fit(image, image_size)

    return stack(load, len(offsets) - 1, "Decoding images").numpy()


def _classes(found: Arrays, splits: dict[str, ArraySplit], where: str) -> list[str]:
    if int(splits["train"].labels.min()) < -1 or int(splits["test"].labels.min()) < 0:
        raise UserError(f"{where} has negative labels; labels count from 0, and only training images may have -1.")
    labels = torch.cat([split.labels for split in splits.values()])
    if "classes" not in found:
        return numbered_classes(labels, len(labels), where)
    classes = [str(name) for name in found["classes"]]
    if (top := int(labels.max())) >= len(classes):
        raise UserError(f"{where} has label {top} and only {len(classes)} classes; labels count from 0.")
    return classes
