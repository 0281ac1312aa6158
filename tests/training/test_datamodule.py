"""Batches of views: order, ranks, workers, resuming."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from icl_msr.augment import Augmentation, Background
from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Attribute, Dataset, normalise
from icl_msr.data.files import FileSplit
from icl_msr.training import datamodule
from icl_msr.training.datamodule import Batch, DataModule, EpochBatches, group_balanced

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def augmentation(views=2, **changes):
    plain = {
        "scale": [0.2, 1.0],
        "ratio": [0.75, 4 / 3],
        "flip": 0.5,
        "jitter": [0.4, 0.4, 0.4, 0.1],
        "jitter_probability": 0.0,
        "gray": 0.0,
        "blur": 0.0,
        "sigma": [0.1, 2.0],
        "solarize": 0.0,
        "size": None,
        "interpolation": "bilinear",
    }
    return Augmentation(**(plain | changes), views=[{} for _ in range(views)])


def dataset(split):
    return Dataset("x", ["a", "b"], 32, split, {}, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(22):
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(paths[-1])
    return FileSplit(paths, torch.arange(22) % 2, 32)


@pytest.fixture(scope="module")
def resident(files):
    return files.in_memory()


class Recorder(pl.LightningModule):
    """Trains nothing and keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def module(split, negatives=None, **changes):
    keys = {"batch_size": 4, "num_workers": 0, "seed": 3, "channels_last": False}
    augment = changes.pop("augmentation", None) or augmentation()
    return DataModule(dataset(split), augment, negatives, **(keys | changes))


def fit(data, root, max_epochs=1, ckpt_path=None, callbacks=(), **trainer):
    recorder = Recorder()
    pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        callbacks=list(callbacks),
        **trainer,
    ).fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


def order(seen):
    return [batch.index.tolist() for _, batch in seen]


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_together_see_the_batches_of_one(world_size):
    one = EpochBatches(103, 8, seed=1)
    ranks = [EpochBatches(103, 8, 1, rank, world_size) for rank in range(world_size)]
    assert len(one) == len(ranks[0]) == 12
    for whole, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)


def test_an_epoch_shows_an_image_once_in_an_order_of_its_own():
    batches = EpochBatches(103, 8, seed=1)
    orders = []
    for batches.epoch in (0, 1, 0):
        orders.append(torch.cat([batch.positions for batch in batches]))
    assert len(orders[0].unique()) == 96
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="larger than the 10 training images"):
        EpochBatches(10, 11, seed=0)
    with pytest.raises(UserError, match=r"shared by 4 devices.*say 8"):
        EpochBatches(100, 10, 0, 0, 4)


def test_views_have_their_shapes_and_the_images_are_untouched(resident):
    class Negatives:
        alpha, repulsion = 2.0, 0.25
        alpha_mode, alpha_schedule = "weight", "linear"

        def __call__(self, query, keys):
            assert keys.dtype == torch.int64
            return query[:, None].repeat(1, 3, 1, 1, 1)

    data = module(resident, Negatives(), channels_last=True, augmentation=augmentation(views=3))
    views = data.views(Batch(0, torch.tensor([5, 1, 7])))
    assert torch.equal(views.images, normalise(resident.images[[5, 1, 7]], MEAN, STD))
    assert [view.shape for view in views.views] == [(3, 3, 32, 32)] * 3
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views.views)
    assert torch.equal(views.negatives.rows[:, 2], views.views[0])
    assert views.negatives.rows.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert (views.negatives.alpha, views.negatives.repulsion) == (2.0, 0.25)
    assert (views.negatives.alpha_mode, views.negatives.alpha_schedule) == ("weight", "linear")
    assert views.labels.tolist() == [1, 1, 1]
    assert module(resident).views(Batch(0, torch.tensor([5, 1, 7]))).negatives is None


def test_an_epoch_can_be_looked_at_again(files, tmp_path):
    data = module(files)
    seen = fit(data, tmp_path, max_epochs=2)
    again = list(data.epoch(1, torch.device("cpu"), batches=2))
    assert [views.index.tolist() for views in again] == order(seen)[5:7]
    assert torch.equal(again[1].views[1], seen[6][1].views[1])


def test_views_depend_on_the_image_and_the_epoch_alone(resident):
    data = module(resident, augmentation=augmentation(jitter_probability=1.0, blur=0.5))
    together, alone = data.views(Batch(1, torch.arange(8))), data.views(Batch(1, torch.tensor([6])))
    for one, many in zip(alone.views, together.views, strict=True):
        torch.testing.assert_close(one[0], many[6])
    later = data.views(Batch(2, torch.arange(8)))
    assert (later.views[0] != together.views[0]).flatten(1).any(1).all()
    assert (together.views[1] != together.views[0]).flatten(1).any(1).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_give_the_views_of_arrays(files, resident, tmp_path, num_workers):
    """For two epochs: workers that live on must hear of the second."""
    by_files = fit(module(files, num_workers=num_workers), tmp_path, max_epochs=2)
    by_arrays = fit(module(resident, num_workers=num_workers), tmp_path, max_epochs=2)
    assert order(by_files) == order(by_arrays)
    assert order(by_files)[:5] != order(by_files)[5:]
    grey_level = 1 / 255 / min(STD)
    for (_, left), (_, right) in zip(by_files, by_arrays, strict=True):
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.labels, right.labels)
        for a, b in zip(left.views, right.views, strict=True):
            assert (a - b).abs().max() <= 1.001 * grey_level


def test_a_batch_is_the_trainers_own_while_workers_write_the_next_ones(files, tmp_path):
    """A worker writes into three pieces of shared memory in turn, and an epoch has more batches than that."""
    held = {}
    for workers in (0, 1, 2):
        data = module(files, num_workers=workers, batch_size=2)
        fit(data, tmp_path)
        loader = data.train_dataloader()
        data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 0
        held[workers] = list(loader)
        assert len(held[workers]) > 6
        data.teardown("fit")
    for workers in (1, 2):
        for mine, other in zip(held[workers], held[0], strict=True):
            assert torch.equal(mine.images, other.images)
            assert all(map(torch.equal, mine.crops, other.crops))


def test_crops_of_photographs_fit_any_size(tmp_path):
    for i, size in enumerate([(70, 40, 3), (33, 90, 3), (64, 64, 3), (40, 50, 3)]):
        Image.fromarray(np.full(size, 60 * i, dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    split = FileSplit([str(tmp_path / f"{i}.jpg") for i in range(4)], torch.zeros(4, dtype=torch.int64), 32)
    ((_, views),) = fit(module(split), tmp_path)
    for view in [views.images, *views.views]:
        expected = normalise((60 * views.index).view(4, 1, 1, 1).expand(4, 3, 32, 32), MEAN, STD)
        assert view.shape == (4, 3, 32, 32)
        torch.testing.assert_close(view, expected, atol=0.02, rtol=0)


def test_photographs_without_a_regularizer_leave_the_whole_images_out(files, tmp_path):
    data = module(files, whole_images=False)
    ((_, views), *_) = fit(data, tmp_path)
    ((_, full), *_) = fit(module(files), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(views.views, full.views, strict=True))
    with pytest.raises(UserError, match=r"loader\.whole_images=true"):
        views.images  # noqa: B018
    assert next(data.epoch(0, torch.device("cpu"))).images.shape == full.images.shape


@pytest.mark.parametrize("whole_images", [True, False])
def test_large_jpegs_may_be_decoded_smaller(tmp_path, monkeypatch, whole_images):
    reductions = []

    def image(self, i, reduction=1, true=FileSplit.image):
        reductions.append(reduction)
        return true(self, i, reduction)

    monkeypatch.setattr(FileSplit, "image", image)
    coarse = np.random.default_rng(0).integers(0, 256, (4, 9, 12, 3), dtype=np.uint8)
    sides = [(901, 1203), (640, 500), (450, 300), (40, 60)]
    for i, (height, width) in enumerate(sides):
        Image.fromarray(coarse[i]).resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg")
    split = FileSplit([str(tmp_path / f"{i}.jpg") for i in range(4)], torch.zeros(4, dtype=torch.int64), 32)
    keys = {"whole_images": whole_images, "augmentation": augmentation(views=2)}
    ((_, small),) = fit(module(split, reduced_jpeg=True, **keys), tmp_path)
    found = dict(zip(small.index.tolist(), reductions, strict=True))
    assert found[0] > 1
    assert found[3] == 1
    ((_, full),) = fit(module(split, **keys), tmp_path)
    pairs = list(zip(small.views, full.views, strict=True))
    if whole_images:
        pairs.append((small.images, full.images))
    for a, b in pairs:
        assert (a - b).abs().mean() < 0.1  # of a standard deviation
        assert not torch.equal(a, b)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_stops_training_in_one_sentence(files, tmp_path, num_workers):
    (tmp_path / "cut.png").write_bytes(Path(files.files[0]).read_bytes()[:200])
    broken = FileSplit([*files.files[:7], str(tmp_path / "cut.png")], torch.zeros(8, dtype=torch.int64), 32)
    with pytest.raises(UserError, match=r"cut\.png") as raised:
        fit(module(broken, num_workers=num_workers), tmp_path)
    assert "\n" not in str(raised.value)


def test_workers_leave_signals_to_the_program(files, tmp_path, monkeypatch):
    """`timeout`, `scancel` and a terminal signal every process of a run, and the run saves itself."""
    seen, others = [], {child.pid for child in multiprocessing.active_children()}  # such as ranks of other tests

    def signal_all(self, batch, batch_idx, true=Recorder.training_step):
        if batch_idx == 0:
            for worker in multiprocessing.active_children():
                if worker.pid in others:
                    continue
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                    os.kill(worker.pid, number)
                seen.append(worker.pid)
        return true(self, batch, batch_idx)

    monkeypatch.setattr(Recorder, "training_step", signal_all)
    assert order(fit(module(files, num_workers=1), tmp_path)) == order(fit(module(files), tmp_path))
    assert len(seen) == 1


@pytest.mark.filterwarnings("error:The workers need")
@pytest.mark.parametrize("free", [0, 2**40])
def test_batches_go_through_pipes_where_shared_memory_is_too_small(files, tmp_path, monkeypatch, free):
    """The same batches; where there is room nothing is said and nothing changes."""
    whole = fit(module(files), tmp_path)
    monkeypatch.setattr(datamodule.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    sent = []
    monkeypatch.setattr(Batch, "as_tensors", lambda self, true=Batch.as_tensors: sent.append(self) or true(self))
    with (
        nullcontext()
        if free
        else pytest.warns(UserWarning, match=r"need 0 MB of shared memory.*through pipes.*shm-size")
    ):
        other = fit(module(files, num_workers=2), tmp_path)
    assert {type(batch.images) for batch in sent} == {torch.Tensor if free else np.ndarray}
    for (_, left), (_, right) in zip(whole, other, strict=True):
        assert torch.equal(left.views[0], right.views[0])
        assert torch.equal(left.images, right.images)


SMALL_SHM = ("unshare", "-rm", "bash", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "bash")
"""Runs a command in which /dev/shm has one megabyte."""


@pytest.mark.slow
def test_a_run_ends_where_shared_memory_is_small(tmp_path):
    """With the real limit, under which a worker would wait for ever."""
    if not shutil.which("unshare") or subprocess.run([*SMALL_SHM, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare and the right to mount")
    rng = np.random.default_rng(0)
    for i in range(48):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    words = ["dataset=images", f"dataset.root={tmp_path}", "dataset.image_size=64", "dataset.resident_size=0"]
    words += ["loader.batch_size=16", "loader.num_workers=2", "method=simclr", "regularizer=none", "logger=csv"]
    words += ["trainer.max_epochs=2", "evaluation=none", "metric=loss", f"hydra.run.dir={tmp_path}/run"]
    line = [*SMALL_SHM, sys.executable, "-m", "icl_msr.run", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "batches go through pipes" in done.stderr
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("when", ["in the epoch", "at its last step", "at its end"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_what_it_had_not_seen(files, resident, tmp_path, when, num_workers):
    """5 batches an epoch, 3 epochs; stopped in or after the second."""
    data = module(files if num_workers else resident, num_workers=num_workers)
    whole = fit(data, tmp_path, max_epochs=3)
    step = 7 if when == "in the epoch" else 10
    options = {"every_n_epochs": 1} if when == "at its end" else {"every_n_train_steps": 1}
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **options)
    fit(data, tmp_path, max_epochs=2, callbacks=[saver])
    rest = fit(data, tmp_path, max_epochs=3, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert order(rest) == order(whole)[step:]
    assert [epoch for epoch, _ in rest] == [epoch for epoch, _ in whole][step:]
    for (_, left), (_, right) in zip(rest, whole[step:], strict=True):
        assert torch.equal(left.views[0], right.views[0])


def test_few_batches_to_overfit_are_the_same_in_every_epoch(resident, tmp_path):
    """Their views are new ones all the same."""
    seen = fit(module(resident), tmp_path, max_epochs=3, overfit_batches=2)
    indices = order(seen)
    assert indices[:2] == indices[2:4] == indices[4:]
    assert indices[:2] == order(fit(module(resident), tmp_path, max_epochs=1))[:2]
    assert not torch.equal(seen[0][1].views[0], seen[2][1].views[0])


def test_the_trainer_needs_no_arguments_for_it(resident, tmp_path):
    """Every default of Lightning's, its logger and its checkpoints; continued from one in the middle of an epoch."""
    whole = Recorder()
    saver = pl.callbacks.ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    pl.Trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[saver]).fit(whole, module(resident))
    rest, path = Recorder(), saver.dirpath + "/epoch=1-step=6.ckpt"
    pl.Trainer(max_epochs=2, default_root_dir=tmp_path).fit(rest, module(resident), ckpt_path=path)
    assert order(rest.seen) == order(whole.seen)[6:]


def located(split, side=12):
    """Return the split with squares as masks, at places that differ."""
    masks = torch.zeros(len(split), 32, 32, dtype=torch.bool)
    for i in range(len(split)):
        masks[i, i % 16 : i % 16 + side, 5 : 5 + side] = True
    return ArraySplit(split.images, split.labels, masks)


SWAP = {"fill": "image", "weight": [1.0, 1.0], "probability": 1.0, "softness": 0.0}


def test_only_the_named_view_has_another_background(resident):
    split, plain = located(resident), augmentation(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0)
    own = module(split, augmentation=plain).views(Batch(0, torch.arange(6)))
    found = module(split, augmentation=plain, background=Background(**SWAP, views=[1])).views(Batch(0, torch.arange(6)))
    assert torch.equal(found.images, own.images)
    assert torch.equal(found.views[0], own.views[0])
    inside = split.masks[:6, None].expand_as(own.views[1])
    torch.testing.assert_close(found.views[1][inside], own.views[1][inside])
    assert (found.views[1] != own.views[1])[~inside].float().mean() > 0.95
    both = module(split, augmentation=plain, background=Background(**SWAP, views=[0, 1])).views(
        Batch(0, torch.arange(6))
    )
    assert torch.equal(both.views[1], found.views[1])
    assert (both.views[0] != found.views[1]).flatten(1).any(1).all()  # each view has a background of its own


def test_backgrounds_are_cut_and_coloured_with_the_object_and_do_not_depend_on_ranks(resident):
    keys = {"augmentation": augmentation(jitter_probability=1.0), "background": Background(**SWAP, views=[0, 1])}
    data = module(located(resident), **keys)
    whole = data.views(Batch(1, torch.arange(8)))
    ranks = [data.views(Batch(1, torch.arange(8)[rank * 2 :][:2])) for rank in range(4)]
    for view, together in enumerate(whole.views):
        torch.testing.assert_close(torch.cat([rank.views[view] for rank in ranks]), together)
    assert torch.equal(module(located(resident), **keys).views(Batch(1, torch.arange(8))).views[1], whole.views[1])
    later = data.views(Batch(2, torch.arange(8)))
    assert (later.views[0] != whole.views[0]).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda split: split, "have no masks or boxes; type background=none, or a data set that has them"),
        (
            lambda split: ArraySplit(split.images, split.labels, torch.ones(len(split), 32, 32, dtype=torch.bool)),
            "the objects fill all but 0 of them; type background=none",
        ),
    ],
)
def test_backgrounds_that_are_not_known_are_refused(resident, change, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        module(change(resident), background=Background(**SWAP, views=[1]))
    assert str(raised.value).startswith("background needs")


def test_backgrounds_need_the_images_in_memory(files):
    boxes = torch.tensor([[2, 2, 9, 9]]).expand(len(files), 4)
    split = FileSplit(files.files, files.labels, 32, boxes)
    with pytest.raises(
        UserError, match=r"type dataset\.resident_size=32 dataset\.memory_budget_gb=9e-05, or background"
    ):
        module(split, background=Background(**SWAP, views=[1]))
    module(split.in_memory(), background=Background(**SWAP, views=[1]))


GROUPED = torch.tensor([0] * 60 + [1] * 7 + [2] * 25 + [-1] * 4 + [4] * 9)


def test_a_balanced_epoch_draws_every_group_equally_often():
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = group_balanced(GROUPED, seed, epoch)
        assert len(order) == 105
        drawn = GROUPED[order]
        for start in range(0, 104, 4):  # rounds of the four groups that have images
            assert sorted(drawn[start : start + 4].tolist()) == [0, 1, 2, 4]
        for group in (0, 1, 2, 4):
            places = (drawn == group).nonzero()[:, 0]
            images, count = order[places].tolist(), int((group == GROUPED).sum())
            assert len(set(images[:count])) == min(count, len(images))  # all of them before the first comes again
            assert images[count:] == images[: len(images) - count]
    assert not torch.equal(group_balanced(GROUPED, 0, 0), group_balanced(GROUPED, 0, 1))
    first = torch.stack([GROUPED[group_balanced(GROUPED, 0, epoch)[0]] for epoch in range(40)])
    assert len(first.unique()) == 4  # the order within a round is random


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_balanced_ranks_and_resumed_epochs_see_the_same_batches(world_size):
    whole = EpochBatches(105, 8, 3, groups=GROUPED)
    whole.epoch = 2
    ranks = [EpochBatches(105, 8, 3, rank, world_size, groups=GROUPED) for rank in range(world_size)]
    for batches in ranks:
        batches.epoch, batches.first = 2, 5
    for batch, *parts in zip(list(whole)[5:], *ranks, strict=True):
        assert torch.equal(batch.positions, torch.cat([part.positions for part in parts]))


def grouped(count):
    split = ArraySplit(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 2)
    attribute = Attribute("place", ["here", "there"], {"train": (torch.arange(count) < 3).long()})
    return Dataset("x", ["a", "b"], 8, split, {}, mean=MEAN, std=STD, attribute=attribute)


def balanced_module(data, batch_size=4, **keys):
    return DataModule(
        data,
        augmentation(),
        None,
        batch_size=batch_size,
        num_workers=0,
        seed=0,
        channels_last=False,
        sampler="group_balanced",
        **keys,
    )


def test_a_balanced_module_takes_the_groups_of_the_data():
    with pytest.warns(UserWarning, match="The smallest of the 4 groups has 1 training images"):
        module = balanced_module(grouped(20))
    assert module.groups.tolist() == grouped(20).groups("train").tolist()
    with pytest.raises(UserError, match="needs the group of each training image, and x has none"):
        balanced_module(dataset(ArraySplit(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9).long())))
    with pytest.raises(UserError, match=r"loader\.block=null"):
        balanced_module(grouped(20), block=256)
