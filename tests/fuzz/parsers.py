"""What reads files of others: a valid file of each kind, and the call that reads it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from support.tiny import composed

from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.core.folder import FORMAT, RunFolder
from icl_msr.core.storage import read_arrays
from icl_msr.data.sources import read_image, read_mask, read_size
from icl_msr.evaluation.texture_only import read_superclasses
from icl_msr.models.exported import load_encoder
from icl_msr.models.weights import read_weights
from icl_msr.report.runs import Run, read_curves


@dataclass
class Parser:
    """A kind of file: its name in the folder, a valid content, and the function that reads it from the folder."""

    name: str
    valid: bytes
    read: Callable[[Path], Any]


def image(kind: str, size: int = 16, **keys: Any) -> bytes:
    """Return an image file of noise."""
    file = BytesIO()
    Image.effect_noise((size, size), 60).convert("RGB").save(file, kind, **keys)
    return file.getvalue()


def pack(**arrays: np.ndarray[Any, Any]) -> bytes:
    """Return an .npz file."""
    file = BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def dataset(*words: str) -> Callable[[Path], Any]:
    """Return a function that builds a data set of the folder."""

    def read(folder: Path) -> Any:
        return build({**_settings(words), "root" if "path" not in _settings(words) else "path": _place(folder, words)})

    return read


@cache
def _settings(words: tuple[str, ...]) -> dict[str, Any]:
    return check(composed(*words, "evaluation=none", "logger=csv")).dataset


def _place(folder: Path, words: tuple[str, ...]) -> str:
    return str(folder / {"dataset=arrays": "arrays.npz", "dataset=images": "list.txt"}.get(words[0], ""))


COCO = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": 16, "height": 16} for n in range(4)],
    "annotations": [
        {"id": n, "image_id": n, "category_id": n % 2, "bbox": [1.0, 2.5, 9.0, 8.0], "iscrowd": 0, "area": 72.0}
        for n in range(4)
    ],
    "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
}
FACTS = {"format": FORMAT, "icl_msr": "0.2.0", "choices": {"method": "moco", "dataset": "confounded"}, "name": "a"}
RESULTS = {"name": "a", "seed": 0, "choices": {}, "classes": ["a"], "chance": 0.5, "records": [], "metric": None}
FOLDER = ("dataset=imagefolder", "dataset.root=.", "dataset.image_size=16")
ANNOTATED = [f"dataset.{part}={name}" for part, name in (("train", "flat"), ("test", "flat"))]
ANNOTATED += [f"dataset.{part}_annotations=coco.json" for part in ("train", "test")]
ARRAYS = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.arange(4) % 2}

PARSERS = {
    "boxes": Parser(
        "boxes.csv",
        b"class,file,xmin,ymin,xmax,ymax\n" + b"".join(b"%c,%d.png,0,1,9,10\n" % (b"ab"[n % 2], n) for n in range(4)),
        dataset(*FOLDER, "dataset.train=train", "dataset.tests=[val]", "dataset.boxes=boxes.csv"),
    ),
    "classes": Parser("classes.txt", b"# two\na\nb cat\n", dataset(*FOLDER, "dataset.classes=classes.txt")),
    "labels": Parser(
        "labels.csv",
        b"image,class\n0.png,a\n1.png,b\n2.png,a\n3.png,1\n",
        dataset(*FOLDER, "dataset.train=train", "dataset.tests=[flat]", "dataset.labels=labels.csv"),
    ),
    "numbers": Parser(
        "labels.txt",
        b"0.png a\n1.png b\n2.png 0\n3.png 1\n",
        dataset(*FOLDER, "dataset.train=train", "dataset.tests=[flat]", "dataset.labels=labels.txt"),
    ),
    "list": Parser("list.txt", b"flat/0.png\nflat/1.png\n\nflat/2.png\n", dataset("dataset=images", "dataset.root=x")),
    "coco": Parser(
        "coco.json",
        json.dumps(COCO).encode(),
        dataset("dataset=coco", "dataset.root=.", *ANNOTATED, "dataset.classes=2", "dataset.image_size=16"),
    ),
    "superclasses": Parser(
        "classes.csv", b"class,superclass\na,x\nb,y\n", lambda f: read_superclasses(f / "classes.csv", ["a", "b"])
    ),
    "npz": Parser("file.npz", pack(**ARRAYS), lambda f: _only_sentences(read_arrays, f / "file.npz")),
    "arrays": Parser(
        "arrays.npz",
        pack(**{f"{part}_{name}": array for part in ("train", "test") for name, array in ARRAYS.items()}),
        dataset("dataset=arrays", "dataset.path=x"),
    ),
    "metrics": Parser("metrics.csv", b"step,epoch,loss,online/knn\n0,0,1.5,\n1,0,1.25,0.5\n", read_curves),
    "captions": Parser("figures/captions.json", b'{"a.png": "A figure."}', lambda f: Run.load(f).pictures),
    "config": Parser(
        "config.yaml",
        b"seed: 3\nmethod: {_target_: icl_msr.methods.SimCLR, temperature: 0.5}\nregularizer: {seed: '${seed}'}\n",
        lambda f: RunFolder(f).saved_config(),
    ),
    "environment": Parser("environment.json", json.dumps(FACTS).encode(), lambda f: RunFolder(f).saved_config()),
    "results": Parser("results.json", json.dumps(RESULTS).encode(), lambda f: Run.load(f).numbers),
    "recipe": Parser(
        "encoder.json",
        b'{"recipe": {"builder": "tiny", "image_size": 16}, "image_size": 16, "mean": [0.5], "std": [0.5]}',
        load_encoder,
    ),
    "safetensors": Parser(
        "file.safetensors",
        save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}),
        lambda f: read_weights(str(f / "file.safetensors"), torch.nn.Linear(3, 2)),
    ),
    **{
        kind: Parser(f"image.{kind}", image(kind), lambda f, name=f"image.{kind}": _image(f / name))
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")
    },
}


def _image(file: Path) -> None:
    read_size(file, file.name)
    read_image(file, file.name)
    read_mask(file, file.name)


def _only_sentences(function: Callable[[Path], Any], file: Path) -> None:
    """Call a function whose caller turns every exception into a sentence."""
    try:
        function(file)
    except Exception as error:
        raise UserError(f"{file} cannot be read.") from error


def make_folder(folder: Path) -> Path:
    """Make a folder with a valid file of every kind, and with the images that they name."""
    for number in range(4):
        for place in (f"train/{'ab'[number % 2]}", f"val/{'ab'[number % 2]}", "flat"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"{number}.png").write_bytes(image("png"))
    for parser in PARSERS.values():
        (folder / parser.name).parent.mkdir(exist_ok=True)
        (folder / parser.name).write_bytes(parser.valid)
    shutil.copy(folder / "flat" / "0.png", folder / "figures" / "a.png")
    return folder


def read(kind: str, folder: Path, content: bytes) -> str | None:
    """Read a file with a content that may be damaged. Return the sentence about it; None if it is read.

    Raises:
        AssertionError: the answer is not one sentence.
        Exception: the file leads to anything but a sentence.
    """
    parser = PARSERS[kind]
    (folder / parser.name).write_bytes(content)
    try:
        parser.read(folder)
    except UserError as error:
        sentence = str(error)
        assert sentence[-1:] in tuple(".?'\")"), sentence
        return sentence
    finally:
        (folder / parser.name).write_bytes(parser.valid)
    return None
