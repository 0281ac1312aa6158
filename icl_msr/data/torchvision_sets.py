"""CIFAR-10, CIFAR-100 and STL-10 as torchvision reads them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torchvision import datasets as torchvision_datasets

from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded, readable
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.sources import TrainOn, fit_all, require_resize, resident

Fold = Annotated[int, Field(ge=0, le=9)]

CIFAR100: Mapping[str, str] = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
"""The classes of each superclass of CIFAR-100."""


def cifar10(*, root: str, download: bool, train_on: TrainOn, corrupted: str | None = None) -> Dataset:
    """Build CIFAR-10: 50,000 training and 10,000 test images of 32 pixels, 10 classes (Krizhevsky, 2009).

    `corrupted` is the folder CIFAR-10-C. Each corruption and severity is a test split, such as `fog_3`.
    """
    return _cifar(torchvision_datasets.CIFAR10, "cifar10", root, download, train_on, corrupted)


def cifar100(*, root: str, download: bool, train_on: TrainOn, corrupted: str | None = None) -> Dataset:
    """Build CIFAR-100: 50,000 training and 10,000 test images of 32 pixels, 100 classes in 20 superclasses.

    Published by Krizhevsky, 2009. `corrupted` is the folder CIFAR-100-C, as in `cifar10`.
    """
    dataset = _cifar(torchvision_datasets.CIFAR100, "cifar100", root, download, train_on, corrupted)
    above = {name: superclass for superclass, names in CIFAR100.items() for name in names.split()}
    return replace(dataset, superclasses=[above[name] for name in dataset.classes])


def stl10(
    *,
    root: str,
    download: bool,
    image_size: PositiveInt,
    train_on: TrainOn,
    fold: Fold | None = None,
    resize: PositiveInt | None = None,
) -> Dataset:
    """Build STL-10: 5,000 labelled, then 100,000 unlabelled training images, and 8,000 test images, of 10 classes.

    Published by Coates, Ng, Lee, 2011, at 96 pixels; 64 is usual in self-supervised learning. Unlabelled images have
    the label -1 and are left out when a classifier is fitted. With `fold`, 0 to 9, only the 1,000 training images of
    that fold have labels. The published protocol takes the mean accuracy over the ten folds on all test images.

    With `resize`, classifiers are fitted and tested on labelled images that are resized to that many pixels, of which
    the centre is cut out: 70 for 64 pixels in ICL-MSR and W-MSE. The views are cut from whole images.
    """
    require_resize(resize, image_size)
    kind = torchvision_datasets.STL10
    train = _open(kind, root, download, lambda: kind(root, split="train+unlabeled", download=download))
    test = _open(kind, root, download, lambda: kind(root, split="test"))
    splits = [
        ArraySplit(fit_all(torch.from_numpy(s.data), image_size), torch.as_tensor(s.labels).long())
        for s in (train, test)
    ]
    if fold is not None:
        file = Path(root) / kind.base_folder / kind.folds_list_file
        with readable(file, "restore it from the archive of STL-10"):
            listed = torch.tensor([int(word) for word in file.read_text().splitlines()[fold].split()])
        labels = torch.full_like(splits[0].labels, -1)
        labels[listed] = splits[0].labels[listed]
        splits[0].labels = labels
    dataset = resident("stl10", test.classes, splits[0], {"test": splits[1]}, train_on)
    if resize is not None:
        index = (splits[0].labels >= 0).nonzero()[:, 0]
        bank, queries = (
            fit_all(torch.from_numpy(pixels), image_size, resize=resize)
            for pixels in (train.data[index.numpy()], test.data)
        )
        shown = ArraySplit(bank, splits[0].labels[index]), {"test": ArraySplit(queries, splits[1].labels)}
        dataset.labelled = replace(
            resident("stl10", test.classes, *shown, train_on), mean=dataset.mean, std=dataset.std
        )
    return dataset


def _cifar(kind: Any, name: str, root: str, download: bool, train_on: TrainOn, corrupted: str | None) -> Dataset:
    train = _open(kind, root, download, lambda: kind(root, train=True, download=download))
    test = _open(kind, root, download, lambda: kind(root, train=False))
    splits = [
        ArraySplit(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
        for s in (train, test)
    ]
    dataset = resident(name, train.classes, splits[0], {"test": splits[1]}, train_on)
    if corrupted is None:
        return dataset
    others = _corrupted(expanded(corrupted))
    return replace(dataset, tests={**dataset.tests, **others}, shifted=tuple(others))


def _corrupted(folder: Path) -> dict[str, ArraySplit]:
    """Return the test splits of CIFAR-10-C or -100-C. A file holds five severities in order (Hendrycks, 2019)."""
    files = sorted(path for path in folder.glob("[!.]*.npy") if path.name != "labels.npy" and path.is_file())
    if not files or not (folder / "labels.npy").is_file():
        raise UserError(f"{folder} has no labels.npy and no corruption.npy; set dataset.corrupted to CIFAR-10-C.")
    found: dict[str, ArraySplit] = {}
    try:
        labels = torch.from_numpy(np.load(folder / "labels.npy")).long()
        for path in files:
            images = np.load(path, mmap_mode="r")
            if (
                images.dtype != np.uint8
                or images.shape[1:] != (32, 32, 3)
                or len(images) != len(labels)
                or len(images) % 5
            ):
                raise UserError(
                    f"{path} is {images.dtype} {images.shape}; it must be uint8 ({len(labels)}, 32, 32, 3)."
                )
            each = len(images) // 5
            for severity in range(5):
                part = slice(severity * each, (severity + 1) * each)
                pixels = torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2).contiguous()
                found[f"{path.stem}_{severity + 1}"] = ArraySplit(pixels, labels[part])
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} cannot be read ({error}); unpack it again.") from None
    return found


def _open(kind: Any, root: str, download: bool, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for missing files and wrong checksums
        tried = f"could not be downloaded ({error})" if download else "is not there in full"
        raise UserError(
            f"{kind.__name__} {tried}: get {kind.url} on a machine with internet and unpack it so that "
            f"{Path(root).absolute() / kind.base_folder} exists, "
            + ("or point dataset.root to a folder that has it." if download else "or set dataset.download=true.")
        ) from error
