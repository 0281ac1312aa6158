from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from icl_msr.augment import Augmentation
from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.files import FileSplit
from icl_msr.negatives import CachedNegatives
from icl_msr.negatives.cached import texture_names
from icl_msr.training.datamodule import Batch, DataModule

N, CLASSES = 10, ("cat", "dog")
LABELS = torch.arange(N) % 2
EVERYTHING = Augmentation(
    scale=[0.2, 1.0],
    ratio=[0.75, 4 / 3],
    interpolation="bilinear",
    flip=0.5,
    jitter=[0.4, 0.4, 0.4, 0.1],
    jitter_probability=0.8,
    gray=0.2,
    blur=0.5,
    sigma=[0.1, 2.0],
    solarize=0.2,
    size=None,
    views=[{}, {"blur": 1.0}],
)


def cached(folder):
    config = {"alpha": 2.0, "alpha_mode": "exponent", "alpha_schedule": "constant", "repulsion": 0.25}
    return CachedNegatives(folder=str(folder), **config)


def write_images(base, suffix, side, seed=0):
    """One image of noise for each training image."""
    random = np.random.default_rng(seed)
    paths = []
    for i, label in enumerate(LABELS.tolist()):
        paths.append(base / CLASSES[label] / f"picture.{i}{suffix}")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(paths[-1])
    return [str(path) for path in paths]


@pytest.fixture
def data(tmp_path):
    split = FileSplit(write_images(tmp_path / "data" / "train", ".bmp", 32), LABELS, 32)
    return Dataset("data", CLASSES, 32, split, {})


def resident(data):
    return replace(data, train=data.train.in_memory())


def module(data, folder, num_workers=0):
    keys = {"batch_size": 5, "num_workers": num_workers, "seed": 3, "channels_last": False}
    return DataModule(data, EVERYTHING, cached(folder), **keys)


def batches(loader, tmp_path):
    """What training sees in two epochs."""

    class Recorder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch)
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    recorder = Recorder()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=2, accelerator="cpu", use_distributed_sampler=False, default_root_dir=tmp_path, **quiet).fit(
        recorder, datamodule=loader
    )
    return recorder.seen


@pytest.mark.parametrize("where", ["memory", "files", "workers"])
def test_a_texture_is_augmented_as_the_query_is(data, where, tmp_path):
    """Textures that are the images themselves give the queries themselves."""
    write_images(tmp_path / "cache" / "train", ".png", 32)
    chosen = resident(data) if where == "memory" else data
    seen = batches(module(chosen, tmp_path / "cache", num_workers=2 * (where == "workers")), tmp_path)
    assert len(seen) == 4
    for views in seen:
        assert views.negatives.rows.shape == (5, 1, 3, 32, 32)
        assert torch.equal(views.negatives.rows[:, 0], views.views[0])
        assert not torch.equal(views.negatives.rows[:, 0], views.views[1])
        assert (views.negatives.alpha, views.negatives.alpha_mode) == (2.0, "exponent")


def test_a_larger_texture_is_cropped_at_the_same_place(data, tmp_path):
    """The box is drawn from the same numbers, in the texture's own pixels."""
    textures = FileSplit(write_images(tmp_path / "cache", ".png", 64, seed=1), LABELS, 32)
    (views, *_) = batches(module(data, tmp_path / "cache"), tmp_path)
    look = {"seed": 3, "epoch": 0}
    boxes = EVERYTHING.crop_parameters(views.index, 64, 64, **look)[0]
    line = torch.arange(64)
    for i, (top, left, height, width) in zip(views.index.tolist(), boxes.tolist(), strict=True):
        box = ((line >= top) & (line < top + height))[:, None] & (line >= left) & (line < left + width)
        inside = textures.image(i) * box  # what lies outside does not matter
        Image.fromarray(inside.permute(1, 2, 0).numpy()).save(textures.files[i])
    again = batches(module(data, tmp_path / "cache"), tmp_path)[0]
    assert torch.equal(again.negatives.rows, views.negatives.rows)
    for i in views.index.tolist():
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(textures.files[i])
    assert not torch.equal(batches(module(data, tmp_path / "cache"), tmp_path)[0].negatives.rows, views.negatives.rows)


def test_names_are_those_of_the_images():
    files = ["/a/dog/train/cat/x.JPEG", "/a/train/dog/images/y.z.jpg"]
    named = Dataset("d", ("cat", "dog"), 8, FileSplit(files, torch.tensor([0, 1]), 8), {})
    assert texture_names(named) == ["cat/x.png", "dog/images/y.z.png"]
    arrays = ArraySplit(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([1, -1, 0]))
    assert texture_names(replace(named, classes=("a/b", "c"), train=arrays)) == [
        "c/00000000.png",
        "unlabelled/00000001.png",
        "a_b/00000002.png",
    ]


def test_images_in_memory_keep_their_names(data):
    assert texture_names(resident(data)) == texture_names(data)
    assert texture_names(data)[3] == "dog/picture.3.png"


def test_names_that_are_not_unique_are_refused():
    files = ["/a/cat/x.jpg", "/a/cat/x.png"]
    twice = Dataset("d", ("cat",), 8, FileSplit(files, torch.tensor([0, 0]), 8), {})
    with pytest.raises(UserError, match=r"2 training images share the texture cat/x\.png"):
        texture_names(twice)


def test_names_of_classes_never_lead_elsewhere():
    images = ArraySplit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, -1]))
    names = texture_names(Dataset("d", ("..", "a/../../b", ".hidden"), 8, images, {}))
    assert [Path(name).parent.as_posix() for name in names] == ["_", "a_.._.._b", "_hidden", "unlabelled"]


def test_a_folder_that_lacks_textures_is_refused_at_once(data, tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*set negatives\.folder"):
        module(data, tmp_path / "cache")
    files = write_images(tmp_path / "cache" / "train", ".png", 32)
    for file in files[4:7]:
        Path(file).unlink()
    with pytest.raises(UserError, match=r"no texture for 3 of the 10 .*picture\.4\.png; write .*icl_msr\.textures"):
        module(data, tmp_path / "cache")


def test_a_damaged_texture_is_named(data, tmp_path):
    files = write_images(tmp_path / "cache" / "train", ".png", 32)
    Path(files[0]).write_bytes(Path(files[0]).read_bytes()[:300])
    with pytest.raises(UserError, match=r"picture\.0\.png"):
        module(resident(data), tmp_path / "cache")
    with pytest.raises(UserError, match=r"picture\.0\.png"):
        batches(module(data, tmp_path / "cache"), tmp_path)


def test_views_of_a_batch_alone(data, tmp_path):
    """The same in whatever batch an image comes."""
    write_images(tmp_path / "cache" / "train", ".png", 32, seed=1)
    loader = module(resident(data), tmp_path / "cache")
    both = loader.views(Batch(1, torch.tensor([7, 2]))).negatives.rows
    assert torch.equal(loader.views(Batch(1, torch.tensor([2]))).negatives.rows, both[1:])
    assert not torch.equal(loader.views(Batch(0, torch.tensor([2]))).negatives.rows, both[1:])
