"""The job of `icl_msr.textures`: one texture per training image, by image quilting."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as F

from icl_msr.core.config import Settings, build, build_as
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.randomness import keys
from icl_msr.core.storage import atomic_write, read_json
from icl_msr.core.terminal import plain_console
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit
from icl_msr.data.sources import cores, progress_bar
from icl_msr.negatives import TextureNegatives
from icl_msr.negatives.cached import texture_names
from icl_msr.training.datamodule import NEGATIVES
from icl_msr.training.hardware import Hardware

BATCH = 64
"""Textures made together. Rounding depends on the size of a batch, so it is the same in every run."""
_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
"""The last bytes of a PNG file."""


def job(settings: Settings, config: DictConfig) -> float:
    """Write the textures of a checked config into Hydra's output folder.

    Raises:
        UserError: the config makes no textures, or the folder holds textures of another config.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    generator = build(settings.negatives)
    if not isinstance(generator, TextureNegatives) or generator.count > 1:
        raise UserError("One texture per image is made, by image quilting; type negatives=texture negatives.count=1.")
    device = build_as(Hardware, settings.hardware).plan().device
    dataset = build_as(Dataset, settings.dataset)
    recipe = {name: settings.negatives[name] for name in ("example", "block", "overlap", "reference", "candidates")}
    recipe |= {"tolerance": settings.negatives["tolerance"], "seed": settings.seed}
    with RunFolder(folder).locked():
        claim(folder, {"dataset": dataset.name, "image_size": dataset.image_size, **recipe})
        made, kept = write(dataset, generator, folder / "train", settings.seed, device)
    plain_console().print(f"{made} textures written, {kept} kept   {folder}")
    return 0.0


def claim(folder: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe of the folder's textures to `textures.json`.

    Raises:
        UserError: the folder holds textures made by another recipe.
    """
    note = folder / "textures.json"
    before = recipe
    with suppress(FileNotFoundError):
        before = read_json(note, "remove the folder, or write into another one, --to FOLDER")
    for name, value in recipe.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} holds textures with {name}={before.get(name)}, and {value} was asked for; write these into "
                "another folder, --to FOLDER."
            )
    atomic_write(note, json.dumps(recipe, indent=2) + "\n")


def write(
    dataset: Dataset, generator: TextureNegatives, base: Path, seed: int, device: torch.device
) -> tuple[int, int]:
    """Make the textures that are missing or damaged below `base`. Return how many were made and how many were kept.

    A texture depends only on the image, its position in the training split and the seed.
    """
    size = dataset.image_size
    files = [base / name for name in texture_names(dataset)]
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    made, written = 0, list[Future[None]]()
    with ThreadPoolExecutor(cores()) as pool, progress_bar() as bar:
        task = bar.add_task("Textures", total=len(files))
        for batch in _batches(len(files)):
            sound = pool.map(lambda i: _is_sound(files[i], size), batch)
            wanted = [i for i, good in zip(batch, sound, strict=True) if not good]
            if wanted:
                key = keys(seed, 0, torch.tensor(batch), NEGATIVES)
                examples = torch.cat(list(pool.map(lambda i, k: _examples(dataset, generator, i, k), batch, key)))
                textures = generator.quilt(examples.to(device), key.to(device), size, size)[:, 0].cpu()
                for future in written:  # files of the previous batch
                    future.result()
                written = [pool.submit(_save, textures[i - batch[0]], files[i]) for i in wanted]
                made += len(wanted)
            bar.update(task, advance=len(batch))
        for future in written:
            future.result()
    return made, len(files) - made


def _batches(count: int) -> Iterator[range]:
    return (range(start, min(start + BATCH, count)) for start in range(0, count, BATCH))


def _is_sound(file: Path, size: int) -> bool:
    """Return whether the file exists and is an undamaged image of `size` pixels."""
    try:
        data = file.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            kind = (image.mode, image.size)
            image.verify()  # checks every checksum
    except Exception:  # Pillow raises many kinds, and all mean that the file is damaged
        return False
    return kind == ("RGB", (size, size)) and data.endswith(_END)


def _examples(dataset: Dataset, generator: TextureNegatives, i: int, key: Tensor) -> Tensor:
    """Return the two example pieces of image i, uint8 (1, 2, 3, p, p), in the resolution of its file if it has one."""
    train, side = dataset.train, generator.sizes(dataset.image_size)[0]
    image = train.image(i) if isinstance(train, FileSplit) else train.load(torch.tensor([i]))[0]
    if min(image.shape[1:]) < side:
        image = F.resize(image, [side], antialias=True)
    return generator.examples(image[None], key[None], side)


def _save(texture: Tensor, file: Path) -> None:
    """Write a PNG file atomically. It is not synced, since that is slow, and the next run replaces damaged files."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(bytes(encode_png(texture).numpy()))
    os.replace(temporary, file)
