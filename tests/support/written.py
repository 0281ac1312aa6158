"""Write run folders as a run would, and read the pages made from them."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
from omegaconf import OmegaConf

from icl_msr.core.folder import FORMAT
from icl_msr.core.records import ACCURACY, GAP, Classifier, Layout, Measurement, Outcome, Records

SPLITS = ("original", "mixed_same", "mixed_rand", "only_fg", "only_bg")
GAPS = (("mixed_same", "mixed_rand"), ("original", "mixed_rand"), ("original", "only_fg"), ("only_bg", "chance"))
LINEAR = Classifier(family="linear")


def classifier(name: str) -> Classifier:
    """Return a classifier from its name, such as `knn-dino` or `linear-10%`."""
    family, *rest = name.split("-")
    fraction = next((float(part[:-1]) / 100 for part in rest if part.endswith("%")), 1.0)
    preset = "".join(part for part in rest if not part.endswith("%"))
    return Classifier(family=family, preset=preset, fraction=fraction)


def accuracy(split: str, value: float, name: str = "linear", fitted_on: str = "train", **more: Any) -> Measurement:
    """Return the record of an accuracy."""
    better: Any = "neither" if split in ("only_bg", "conflict_shape") else "more"
    known = {"classifier": classifier(name), "fitted_on": fitted_on, "better": better, **more}
    return Measurement(kind="accuracy", split=split, value=value, **known)


def gap(split: str, minus: str, points: float, name: str = "linear", fitted_on: str = "train", **more: Any) -> Any:
    """Return the record of a gap."""
    known = {"classifier": classifier(name), "fitted_on": fitted_on, "better": "less", "unit": "points", **more}
    return Measurement(kind="gap", split=split, minus=minus, value=points, **known)


def outcome(*records: Measurement, seed: int = 0, **facts: Any) -> Outcome:
    """Return the outcome of a run with these measurements."""
    layouts = {layout.kind: layout for layout in (ACCURACY, GAP)}
    return Outcome(seed=seed, records=Records(list(records), layouts=layouts), **facts)


def save(folder: Path, results: Outcome) -> None:
    """Write `results.json`."""
    (folder / "results.json").write_text(json.dumps(results.to_json()))


def top1(method: str, regularizer: str, seed: int, encoder: str, classifier: str, fitted_on: str, split: str) -> float:
    """Return a plausible accuracy that is the same on every call."""
    base = {"original": 0.84, "mixed_same": 0.80, "mixed_rand": 0.47, "only_fg": 0.42, "only_bg": 0.55}[split]
    if fitted_on == "balanced":
        base = {"original": 0.58, "mixed_same": 0.57, "mixed_rand": 0.52, "only_fg": 0.50, "only_bg": 0.16}[split]
    base += 0.04 * (regularizer == "msr") * (1 if split in ("mixed_rand", "only_fg") else -1)
    base -= 0.03 * (classifier != "linear") + 0.02 * (method == "byol")
    if encoder == "untrained":
        base = 0.1 + 0.45 * (base - 0.1)
    wobble = math.sin(hash((seed * 7, len(split), len(method))) % 97) * 0.012
    return round(base + wobble, 4)


def write_run(folder: Path, method: str = "moco", regularizer: str = "msr", seed: int = 0, **config: Any) -> Path:
    """Write the folder of a complete run on the confounded data set."""
    folder.mkdir(parents=True)
    (folder / "figures").mkdir()
    choices = {"method": method, "regularizer": regularizer, "negatives": "none", "backbone": "tiny"}
    choices |= {"dataset": "confounded", "augment": "small", "optimizer": "adam", "hardware": "cpu", "logger": "csv"}
    settings: dict[str, Any] = {
        "seed": seed,
        "method": {
            "_target_": f"icl_msr.methods.{method}",
            "temperature": 0.2,
            "queue_size": 4096,
            "momentum": 0.99,
            "head": {"hidden": 512, "out": 128, "batch_norm": True},
        },
        "regularizer": {"_target_": f"icl_msr.regularizers.{regularizer}", "weight": 1.0, "gamma": 1.0, "strata": 6},
        "negatives": None,
        "backbone": {"_target_": "icl_msr.models.backbones.tiny", "stem": "small", "weights": None},
        "dataset": {"_target_": "icl_msr.data.confounded", "rho": 0.9, "size": 32, "count": 20000, "train_on": "full"},
        "augment": {"crop": {"scale": [0.2, 1.0], "ratio": [0.75, 1.3333333]}, "flip": 0.5, "gray": 0.1},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.003, "weight_decay": 1e-6, "batch_size": 256},
        "logger": {"version": str(folder)},
        "trainer": {"max_epochs": 12, "precision": "32-true"},
    }
    for key, value in config.items():
        group, _, name = key.partition("__")
        settings[group][name] = value
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")

    accuracies, gaps = [], []
    for encoder in ("trained", "untrained"):
        for classifier in ("knn-dino", "linear"):
            for fitted_on in ("train", "balanced"):
                fit = {"name": classifier, "fitted_on": fitted_on, "encoder": encoder}
                at = {split: top1(method, regularizer, seed, encoder, classifier, fitted_on, split) for split in SPLITS}
                for split, value in at.items():
                    accuracies.append(accuracy(split, value, low=value - 0.03, high=value + 0.03, n=1000, **fit))
                for first, second in GAPS:
                    points = round(100 * (at[first] - at.get(second, 0.1)), 4)
                    gaps.append(gap(first, second, points, low=points - 2.5, high=points + 2.4, **fit))
    known: dict[str, Any] = {"classifier": LINEAR, "fitted_on": "train"}
    chosen = Measurement(kind="choice", metric="chosen", value=0.01, unit="number", **known)
    choice = Layout(kind="choice", title="The learning rates", rows=("classifier", "fitted_on"), folded=True)
    results = outcome(
        *accuracies,
        *gaps,
        chosen,
        name=f"{method}-{regularizer}-none-confounded",
        choices=choices,
        seed=seed,
        derived={"effective_learning_rate": 0.003, "total_steps": 936, "meta_interval": 4},
        parameters=307_456,
        wall_time_s=203.4,
        images_per_second=2310.5,
        peak_memory_mb=842.0,
        classes=["disk", "ring", "square", "star", "heart", "moon", "cross", "arrow", "drop", "gear"],
        chance=0.1,
        train_on="full",
        final={"online/knn": 0.78, "loss": 5.2},
    )
    results.records.layouts["choice"] = choice
    save(folder, results)
    (folder / "environment.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "command": f"python -m icl_msr.run method={method} regularizer={regularizer} seed={seed}",
                "commit": "95ada6b0c1",
                "config_hash": "5f1d20aa",
                "python": "3.11.9",
                "torch": "2.9.0",
                "hardware": "2 CPU cores",
                "started": "2025-11-22T07:12:00",
            }
        )
    )
    load = "import torchvision\nfrom safetensors.torch import load_file\n\nencoder = torchvision.models.resnet18()\n"
    (folder / "encoder.json").write_text(json.dumps({"load": load + 'encoder.load_state_dict(load_file("encoder"))'}))
    write_metrics(folder / "metrics.csv")
    noise = np.random.default_rng(0).uniform(size=(96, 480, 3))
    matplotlib.image.imsave(folder / "figures/views.png", noise)
    matplotlib.image.imsave(folder / "figures/strata.png", noise)
    (folder / "figures/captions.json").write_text(
        json.dumps({"strata.png": "Strata <a> & b", "views.png": "Two views."})
    )
    return folder


def write_metrics(file: Path) -> None:
    """Write sparse rows, as Lightning's CSVLogger does."""
    names = ["epoch", "step", "loss", "loss/contrastive", "loss/msr", "msr/meta_grad_norm", "msr/uniformity_grad_norm"]
    names += ["msr/uniformity", "lr", "embedding_std", "images_per_second", "online/knn", "online/probe"]
    random = np.random.default_rng(1)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for step in range(0, 936, 4):
            t, noise = step / 936, random.normal(scale=0.1)
            row: dict[str, float] = {"epoch": step // 78, "step": step, "lr": 0.003 * min(1, 8 * t)}
            row |= {"loss": 8 - 3 * t + noise, "loss/contrastive": 5 - 2 * t + noise, "loss/msr": 3 - t}
            row |= {"msr/meta_grad_norm": 1e-3 * math.exp(-2 * t), "msr/uniformity_grad_norm": 0.3 * math.exp(-t)}
            writer.writerow(row | {"msr/uniformity": -0.3 - t, "images_per_second": 2300 + 200 * noise})
            if step % 78 == 0:
                monitors = {
                    "embedding_std": 0.05 + 0.02 * t,
                    "online/knn": 0.3 + 0.5 * t,
                    "online/probe": 0.35 + 0.4 * t,
                }
                writer.writerow({"epoch": step // 78, "step": step} | monitors)


def write_box_run(folder: Path, train_on: str, full: float, fg: float, seed: int = 0) -> Path:
    """Write the folder of a run on a data set with boxes."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "method": {"temperature": 0.2}, "dataset": {"train_on": train_on}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    records = [accuracy("full", full), accuracy("fg", fg), gap("full", "fg", 100 * (full - fg))]
    choices = {"method": "moco", "dataset": "imagefolder"}
    save(folder, outcome(*records, name="moco", choices=choices, seed=seed, train_on=train_on))
    return folder


class Page(HTMLParser):
    """The parts of a page that tests look at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.table: list[list[str]] = []
        self.text = file.read_text()
        self.feed(self.text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)
        self.sources += [known[name] or "" for name in ("src", "srcset") if name in known]
        if "href" in known:
            self.links.append(known["href"] or "")
        if tag == "table":
            self.table = self.tables[known.get("id") or known.get("class") or str(len(self.tables))] = []
        elif tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += (" " if self.open[-1] == "small" else "") + data.strip()

    def assert_self_contained(self) -> None:
        assert all(source.startswith("data:image/") for source in self.sources)
        assert not {"script", "link", "iframe"} & set(self.tags)
        assert not re.search(r"url\(|@import|https?://", self.text)
