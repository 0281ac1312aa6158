"""Measure how far features move when the background of an image is swapped, for the encoders of a study.

    python experiments/sight/moved.py runs/studies/sight [--to experiments/sight/moved.csv]

For each channel, the mean squared change from `original` to another split, divided by twice its variance in `original`:
0 if the change of background does nothing, 1 if it does as much as another image. The mean is over the channels that
are alive. No probe is fitted, so the number belongs to the encoder alone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from icl_msr.core.config import build
from icl_msr.core.tables import csv_text
from icl_msr.data.dataset import Dataset, normalise
from icl_msr.models.backbones import Backbone, evaluating

SPLITS = ("mixed_same", "mixed_rand", "only_fg", "only_bg")


@torch.no_grad()
def features(backbone: Backbone, dataset: Dataset, split: str, images: int) -> Tensor:
    """Return the features (N, c) of the first images of a test split."""
    index = torch.arange(min(images, len(dataset.tests[split])))
    with evaluating(backbone):
        parts = [
            backbone(normalise(dataset.tests[split].load(i), dataset.mean, dataset.std))
            for i in torch.split(index, 500)
        ]
    return torch.cat(parts)


def moved(backbone: Backbone, dataset: Dataset, images: int) -> dict[str, float]:
    """Return the movement of the features from `original` to each of `SPLITS`."""
    original = features(backbone, dataset, "original", images)
    variance = original.var(0)
    alive = variance > 1e-8 * variance.amax()
    found = {}
    for split in SPLITS:
        change = (features(backbone, dataset, split, images) - original).square().mean(0) / (2 * variance)
        found[split] = round(float(change[alive].mean()), 4)
    return found


def _node(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True)


def main(words: Sequence[str] | None = None) -> None:
    """Write and print a line for each run, and one for an untrained encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", help="the folder of the study's runs: <row>/<seed>/")
    parser.add_argument("--to", type=Path, help="a .csv file")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--tiny", action="store_true", help="an untrained encoder, few images")
    options = parser.parse_args(words)
    folders = sorted(options.study.glob("*/*/encoder.safetensors")) if options.study else []
    if not folders and not options.tiny:
        parser.error("name a folder that holds <row>/<seed>/encoder.safetensors")
    rows: list[list[Any]] = []
    config: Any
    if options.tiny:
        from icl_msr.core.compose import compose

        config = compose(["dataset.train=16", "dataset.balanced=16", "dataset.test=32", "dataset.cache=null"])
        dataset: Dataset = build(_node(config.dataset))
        backbone = build(_node(config.backbone), image_size=dataset.image_size)
        rows.append(["untrained", 0, *moved(backbone, dataset, 32).values()])
    for number, file in enumerate(folders):
        config = OmegaConf.load(file.parent / "config.yaml")
        if not number:
            dataset = build(_node(config.dataset))
        torch.manual_seed(config.seed)
        backbone = build(_node(config.backbone), image_size=dataset.image_size)
        if not number:
            rows.append(["untrained", config.seed, *moved(backbone, dataset, options.images).values()])
        backbone.net.load_state_dict(load_file(file))
        rows.append([file.parts[-3], config.seed, *moved(backbone, dataset, options.images).values()])
    lines: list[list[Any]] = [["row", "seed", *SPLITS], *rows]
    for line in lines:
        print(*line)
    if options.to is not None:
        options.to.write_text(csv_text(lines))


if __name__ == "__main__":
    main()
