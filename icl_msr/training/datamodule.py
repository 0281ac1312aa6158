"""The DataModule: it turns a data set into batches of `Views` on the training device."""

import itertools
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from icl_msr.augment import Augmentation, Background
from icl_msr.augment.background import NARROWEST, widest
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers, keys, permutation
from icl_msr.core.signals import SIGNALS
from icl_msr.core.views import AlphaMode, AlphaSchedule, NonSemantic, Views
from icl_msr.data.crops import boxes_around
from icl_msr.data.dataset import ArraySplit, Dataset, Split, normalise
from icl_msr.data.files import FileSplit
from icl_msr.negatives.cached import CachedNegatives

SHARED_MEMORY = Path("/dev/shm")
"""The folder in which Linux keeps tensors that processes share."""

NEGATIVES = -2
"""The view number of the negatives' keys."""

BACKGROUNDS = 1 << 10
"""The view number of the keys of the first view's background; those of the other views follow."""

GROUPS = -6
"""The view number of the keys that order the groups of a balanced epoch."""

_DECODED = 16  # photographs that a worker holds in memory at once
_AHEAD = 2  # batches that a worker makes before the trainer has taken the first of them


class Batch(NamedTuple):
    """A batch on its way from the loader to the device. It has pixels only if the images are not on the device."""

    epoch: int
    positions: Tensor
    """Positions in the training split, (N,) int64."""
    images: Tensor | None = None
    """Whole images, (N, 3, S, S) uint8."""
    crops: list[Tensor] | None = None
    """Crops of the V views, tensors (N, 3, s, s) uint8."""
    textures: Tensor | None = None
    """Crops of the cached textures as in the first view, (N, 3, s, s) uint8; None without cached textures."""

    def as_arrays(self) -> "Batch":
        """Return the batch with numpy arrays. Workers send arrays through a pipe, but tensors through shared memory."""
        return self._each(Tensor.numpy)

    def as_tensors(self) -> "Batch":
        """Return the batch with tensors; the inverse of `as_arrays`."""
        return self._each(torch.as_tensor)

    def unshared(self) -> "Batch":
        """Return the batch with a copy of each tensor in shared memory, into which a worker will write again."""
        return self._each(lambda pixels: pixels.clone() if pixels.is_shared() else pixels)

    def _each(self, change: Callable[[Any], Any]) -> "Batch":
        return self._replace(
            images=None if self.images is None else change(self.images),
            crops=None if self.crops is None else [change(view) for view in self.crops],
            textures=None if self.textures is None else change(self.textures),
        )


class Negatives(Protocol):
    """A generator of non-semantic negatives. `NonSemantic` explains its attributes."""

    alpha: float
    repulsion: float
    alpha_mode: AlphaMode
    alpha_schedule: AlphaSchedule

    def __call__(self, query: Tensor, keys: Tensor) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return m negatives of each image, (N, m, C, H, W), and scalar tensors for the log if there are any.

        Args:
            query: the first view (N, C, H, W).
            keys: keys of the random numbers, int64 (N,).
        """
        ...


def group_balanced(groups: Tensor, seed: int, epoch: int) -> Tensor:
    """Return an order of N images in which every group is drawn equally often: int64 (N,), on the CPU.

    The order is made of rounds of one image per group, in random order. The images of a group are taken one after the
    other, in random order, and again from the first. So an image comes back as late as it can, and images of large
    groups are left out of an epoch.

    Args:
        groups: int64 (N,), the group of each image; those of group -1 are never drawn.
        seed, epoch: of the order.
    """
    order = permutation(seed, epoch, len(groups))
    order = order[groups[order] >= 0]
    names, group, counts = torch.unique(groups[order], return_inverse=True, return_counts=True)
    members = order[group.argsort(stable=True)]
    first = counts.cumsum(0) - counts
    rounds = torch.arange(-(-len(groups) // len(names)))
    images = members[first + rounds[:, None] % counts]  # (rounds, groups)
    shuffled = integers(keys(seed, epoch, rounds, GROUPS), len(names)).argsort(dim=1, stable=True)
    return images.gather(1, shuffled).flatten()[: len(groups)]


class EpochBatches:
    """Yields a rank's part of every batch of an epoch. It depends only on the seed and the epoch.

    All ranks together see the batches that one rank would see. Images that do not fill a batch are left out.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fixed: bool = False,
        block: int | None = None,
        groups: Tensor | None = None,
    ) -> None:
        if batch_size > length:
            raise UserError(
                f"The batch size {batch_size} is larger than the {length} training images; set it to {length} or less."
            )
        if batch_size % world_size:
            raise UserError(
                f"The batch size {batch_size} cannot be shared by {world_size} devices; "
                f"set it to a multiple, say {max(1, batch_size // world_size) * world_size}."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.fixed = fixed
        """True if every epoch has the order of the first one, as `Trainer(overfit_batches=...)` asks for."""
        self.block = block
        """The images that are mixed at a time; None mixes all. See `permutation`."""
        self.groups = groups
        """The group of each image, if groups are to be drawn equally often. See `group_balanced`."""
        self.epoch = 0
        self.first = 0
        """The first batch of the epoch to yield. A resumed run skips the batches that it has seen."""

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch = 0 if self.fixed else self.epoch
        if self.groups is None:
            order = permutation(self.seed, epoch, self.length, self.block)
        else:
            order = group_balanced(self.groups, self.seed, epoch)
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * self.share
            yield Batch(self.epoch, order[start : start + self.share])


class DataModule(pl.LightningDataModule):
    """Batches of `Views` for training. Evaluations read the splits of the data set themselves.

    A split in memory moves to the training device once, and a batch is then an index. Images of other splits are
    decoded and cropped by workers. Everything else happens on the device, in `on_after_batch_transfer`.
    Use it with `Trainer(use_distributed_sampler=False)`.

    Args:
        dataset: the data set to train on.
        augmentation: the augmentation that makes the views.
        negatives: a generator of non-semantic negatives of the first view, cached textures, or None.
        batch_size: images of one micro-batch, on all devices together.
        num_workers: processes that decode images. A data set in memory needs none.
        seed: seed of the order, the views and the negatives.
        channels_last: memory format of all images that reach the backbone.
        block: images that are mixed at a time, for a data set that is read from afar. None mixes all.
        whole_images: whether the batches hold the un-augmented images, which regularizers need, if they are photographs
            that workers decode. Batches of images in memory always do.
        reduced_jpeg: whether a large JPEG is decoded at 1/2, 1/4 or 1/8 of its sides, if every crop and the whole image
            are then still as large as they are needed. It is faster, and changes the pixels a little.
        background: the change of some views' backgrounds, or None.
        sampler: `group_balanced` draws every group of the data set equally often. An epoch keeps its number of batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        negatives: Negatives | CachedNegatives | None,
        *,
        batch_size: PositiveInt,
        num_workers: NonNegativeInt,
        seed: NonNegativeInt,
        channels_last: bool,
        block: PositiveInt | None = None,
        whole_images: bool = True,
        reduced_jpeg: bool = False,
        background: Background | None = None,
        sampler: Literal["uniform", "group_balanced"] = "uniform",
    ) -> None:
        super().__init__()
        self.dataset, self.augmentation, self.negatives = dataset, augmentation, negatives
        self.batch_size, self.num_workers, self.seed, self.block = batch_size, num_workers, seed, block
        self.whole_images, self.reduced_jpeg = whole_images, reduced_jpeg
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self._training: _TrainLoader | None = None
        self._resident: dict[str, Tensor] = {}
        self._textures: Split | None = None
        if isinstance(negatives, CachedNegatives):
            self._textures = negatives.open(dataset)
            self._first_view = replace(augmentation, views=augmentation.views[:1])
        self._labels = dataset.train.labels
        self.groups = None if sampler == "uniform" else _groups(dataset, batch_size, block)
        self.background = background
        if background is not None:
            background.require(len(augmentation.recipes))
            self._objects = _objects(dataset)

    @override
    def train_dataloader(self) -> "_TrainLoader":
        # The loader of this rank.
        self._training = self._loader(self.whole_images)
        return self._training

    @override
    def teardown(self, stage: str) -> None:
        # Ends the workers now. The garbage collector would wait for each of them.
        if self._training is not None:
            self._training.close()
            self._training = None

    @override
    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def _loader(self, whole_images: bool = True) -> "_TrainLoader":
        trainer = self.trainer
        assert trainer is not None
        train = self.dataset.train
        source: TorchDataset[Any] = _Indices()
        if isinstance(train, FileSplit):
            textures = self._textures if isinstance(self._textures, FileSplit) else None
            sizes = [recipe.size or self.dataset.image_size for recipe in self.augmentation.recipes]
            source = _Crops(train, textures, self.augmentation, sizes, self.seed, whole_images, self.reduced_jpeg)
        fixed = bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        batches = EpochBatches(
            len(train),
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            fixed,
            self.block,
            self.groups,
        )
        workers = self.num_workers if isinstance(train, FileSplit) else 0
        if isinstance(source, _Crops) and workers:
            ranks_here = trainer.world_size // trainer.num_nodes
            source.piped = _too_small_for(source.bytes_of(batches.share) * (_AHEAD + 1) * workers * ranks_here)
        loader = DataLoader(
            source,
            batch_size=None,
            sampler=batches,
            collate_fn=_as_it_is,  # the default would turn arrays into tensors in the worker
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        return _TrainLoader(loader, batches, trainer)

    def epoch(self, epoch: int, device: torch.device, batches: int | None = None) -> Iterator[Views]:
        """Yield the batches of an epoch again, as this rank trained on them, with their un-augmented images.

        The trainer's position does not change.
        """
        loader = self._loader()
        loader.batches.epoch = epoch
        for batch in itertools.islice(loader.loader, batches):
            if isinstance(batch, UserError):
                raise batch
            yield self.views(move_data_to_device(batch.as_tensors().unshared(), device))

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # Batches of other loaders stay as they are.
        return self.views(batch) if isinstance(batch, Batch) else batch

    @torch.no_grad()
    def views(self, batch: Batch) -> Views:
        """Return the views of a batch, on the device of its index."""
        data, index = self.dataset, batch.positions
        images = self._images("train", data.train, index) if batch.crops is None else batch.images
        sources: Tensor | Sequence[Tensor] | None = images if batch.crops is None else batch.crops
        if self.background is not None and images is not None:
            sources = self._on_backgrounds(self.background, images, batch)
        assert sources is not None
        views = self._augmented(self.augmentation, sources, batch)
        negatives, of, log = None, self.negatives, dict[str, Tensor]()
        if of is not None:
            if isinstance(of, CachedNegatives):
                textures = batch.textures
                found = self._images("textures", self._textures, index) if textures is None else [textures]
                rows = self._augmented(self._first_view, found, batch)[0][:, None]
            else:
                made = of(views[0], keys(self.seed, batch.epoch, index, NEGATIVES))
                rows, log = made if isinstance(made, tuple) else (made, log)
            rows = self._laid_out(rows.flatten(0, 1)).view_as(rows)
            negatives = NonSemantic(rows, of.alpha, of.repulsion, of.alpha_mode, of.alpha_schedule, log)
        whole = None if images is None else self._laid_out(normalise(images, data.mean, data.std))
        self._labels = self._labels.to(index.device)
        return Views(whole, [self._laid_out(view) for view in views], index, self._labels[index], negatives)

    def _augmented(self, augmentation: Augmentation, images: Tensor | Sequence[Tensor], batch: Batch) -> list[Tensor]:
        data = self.dataset
        return augmentation(
            images,
            batch.positions,
            seed=self.seed,
            epoch=batch.epoch,
            size=data.image_size,
            mean=data.mean,
            std=data.std,
            cropped=batch.crops is not None,
            memory_format=self.format,
        )

    def _on_backgrounds(self, background: Background, images: Tensor, batch: Batch) -> list[Tensor]:
        """Return the whole images of each view, with the objects of some views on other backgrounds."""
        index, (masks, boxes, able) = batch.positions, self._objects
        sources = [images] * len(self.augmentation.recipes)
        for view in background.views:
            key = keys(self.seed, batch.epoch, index, BACKGROUNDS + view)
            donors = background.donors(self._moved("able", able, index.device), index, key)
            others, behind = (
                self._images("train", self.dataset.train, donors),
                self._moved("boxes", boxes, index.device),
            )
            sources[view] = background(
                images, self._moved("masks", masks, index.device)[index], others, behind[donors], key
            )
        return sources

    def _images(self, name: str, split: Split | None, index: Tensor) -> Tensor:
        assert isinstance(split, ArraySplit)
        return self._moved(name, split.images, index.device)[index]

    def _moved(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor on the device, where it stays under this name."""
        if name not in self._resident or self._resident[name].device != device:
            self._resident[name] = tensor.to(device)
        return self._resident[name]

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.format)


class _Objects(NamedTuple):
    """The places of the objects in the training images."""

    masks: Tensor
    """Masks, bool (N, S, S)."""
    boxes: Tensor
    """Boxes around the masks, int64 (N, 4)."""
    able: Tensor
    """Positions of the images with a strip of background that is wide enough to be given to others, int64 (M,)."""


def _objects(dataset: Dataset) -> _Objects:
    """Return the places of the objects in the training images.

    Raises:
        UserError: they are not known, the images are not in memory, or too few of them show a background.
    """
    train, size = dataset.train, dataset.image_size
    if isinstance(train, FileSplit) and train.located and train.region == "full":
        gigabytes = 4e-9 * size**2 * sum(map(len, [train, *dataset.tests.values()]))
        raise UserError(
            f"background needs the training images in memory, and {dataset.name} decodes them in training; type "
            f"dataset.resident_size={size} dataset.memory_budget_gb={gigabytes:.2g}, or background=none."
        )
    if not isinstance(train, ArraySplit) or train.masks is None:
        raise UserError(
            f"background needs to know where the objects are, and the training images of {dataset.name} have no masks "
            "or boxes; type background=none, or a data set that has them, such as dataset=confounded, or "
            "dataset=imagefolder with dataset.masks=<folder> or dataset.boxes=<table>."
        )
    boxes = boxes_around(train.masks)
    able = (widest(boxes, size) >= NARROWEST * size).nonzero()[:, 0]
    if len(able) < 2:
        raise UserError(
            f"background needs two training images with a background, and in {dataset.name} the objects fill all but "
            f"{len(able)} of them; type background=none."
        )
    return _Objects(train.masks, boxes, able)


def _groups(dataset: Dataset, batch_size: int, block: int | None) -> Tensor:
    """Return the group of each training image.

    Raises:
        UserError: the groups are not known, or images must be read in blocks.
    """
    groups = dataset.groups("train")
    if groups is None or not (groups >= 0).any():
        raise UserError(
            f"loader.sampler=group_balanced needs the group of each training image, and {dataset.name} has none; "
            "choose dataset=confounded or dataset=wilds, or type loader.sampler=uniform."
        )
    if block is not None:
        raise UserError(
            "loader.sampler=group_balanced reads images from everywhere, and loader.block reads them in blocks; type "
            "loader.block=null, or loader.sampler=uniform."
        )
    counts = groups[groups >= 0].bincount()
    counts = counts[counts > 0]
    if batch_size > (room := int(counts.min() - 1) * len(counts) + 1):
        warnings.warn(
            f"The smallest of the {len(counts)} groups has {counts.min()} training images, so that a batch of "
            f"{batch_size} may hold an image more than once; batches of up to {room} do not.",
            stacklevel=2,
        )
    return groups


class _TrainLoader:
    """A DataLoader that begins at the trainer's position.

    Lightning makes the iterator of a resumed run before it has restored its progress. A generator reads the progress
    later, when the first batch is fetched. So the trainer's progress is the only state.
    """

    def __init__(self, loader: DataLoader[Any], batches: EpochBatches, trainer: pl.Trainer) -> None:
        self.loader, self.batches, self.trainer = loader, batches, trainer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.batches.epoch = self.trainer.current_epoch
        self.batches.first = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch.as_tensors().unshared()

    def close(self) -> None:
        """Delete the DataLoader and so end its workers."""
        del self.loader

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state. Its presence tells Lightning that a run may resume in the middle of an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state, which is empty."""


def _leave_signals(worker: int) -> None:
    """Ignore signals in a worker. They reach all processes of a run, and the run itself answers them and saves."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def _empty(images: int, size: int, shared: bool) -> Tensor:
    """Return room for images (N, 3, S, S) uint8. The channels of a pixel lie side by side in memory."""
    room = torch.empty(images, size, size, 3, dtype=torch.uint8)
    if shared:
        room.share_memory_()  # type: ignore[no-untyped-call]
    return room.permute(0, 3, 1, 2)


def _too_small_for(needed: int) -> bool:
    """Return whether less than `needed` bytes of shared memory are free, and warn. A worker would wait for ever."""
    if not SHARED_MEMORY.is_dir():
        return False
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        warnings.warn(
            f"The workers need {needed / 1e6:,.0f} MB of shared memory, and {SHARED_MEMORY} has {free / 1e6:,.0f} MB "
            "free: batches go through pipes, which is slower. In Docker, --shm-size gives more.",
            stacklevel=2,
        )
    return needed > free


class _Indices(TorchDataset[Batch]):
    """A data set that loads nothing, because the images are on the device."""

    def __getitem__(self, batch: Batch) -> Batch:
        return batch


class _Crops(TorchDataset[Any]):
    """Decodes the images of a batch in a worker and cuts their crops. Textures are cut as the first view."""

    def __init__(
        self,
        split: FileSplit,
        textures: FileSplit | None,
        augmentation: Augmentation,
        sizes: Sequence[int],
        seed: int,
        whole_images: bool,
        reduced_jpeg: bool,
    ) -> None:
        self.split, self.textures, self.augmentation, self.sizes, self.seed = split, textures, augmentation, sizes, seed
        self.whole_images, self.reduced_jpeg = whole_images, reduced_jpeg
        self.piped = False
        """True if batches go to the trainer through pipes, which takes two more copies than shared memory."""
        self._rooms: list[Batch] = []
        self._turn = 0

    def bytes_of(self, images: int) -> int:
        """Return the memory that the pixels of this many images take, in bytes."""
        sides = [*self.sizes]
        if self.whole_images:
            sides.append(self.split.image_size)
        if self.textures is not None:
            sides.append(self.sizes[0])
        return 3 * images * sum(side**2 for side in sides)

    def __getitem__(self, batch: Batch) -> Batch | UserError:
        """Return the batch with its pixels. An error is returned, since a worker would wrap it in a traceback."""
        positions = batch.positions
        room = self._room(len(positions))
        try:
            for split in (self.split, *([self.textures] if self.textures is not None else [])):
                split.prepare(positions)
            for first in range(0, len(positions), _DECODED):
                part = slice(first, first + _DECODED)
                decoded, boxes = self._decoded(self.split, positions[part], batch.epoch)
                if room.images is not None:
                    for row, image in zip(room.images[part], decoded, strict=True):
                        row.copy_(self.split.square(image))
                self._cut(room.crops or [], part, decoded, boxes)
                if self.textures is not None and room.textures is not None:
                    self._cut([room.textures], part, *self._decoded(self.textures, positions[part], batch.epoch))
        except UserError as error:
            return error
        done = room._replace(epoch=batch.epoch, positions=positions)
        return done.as_arrays() if self.piped else done

    def _room(self, images: int) -> Batch:
        """Return a batch with room for its pixels.

        A worker writes into the same few pieces of shared memory in turn, since new memory is slow to get. A piece is
        free again when its turn comes: the trainer has copied it before it asked for one batch more.
        """
        shared = get_worker_info() is not None and not self.piped
        turn, self._turn = self._turn, (self._turn + 1) % (_AHEAD + 1)
        if shared and turn < len(self._rooms):
            return self._rooms[turn]
        room = Batch(
            epoch=0,
            positions=torch.empty(0),
            images=_empty(images, self.split.image_size, shared) if self.whole_images else None,
            crops=[_empty(images, size, shared) for size in self.sizes],
            textures=None if self.textures is None else _empty(images, self.sizes[0], shared),
        )
        if shared:
            self._rooms.append(room)
        return room

    def _decoded(self, split: FileSplit, index: Tensor, epoch: int) -> tuple[list[Tensor], Tensor]:
        """Return the images at `index` (n,), and the crops of their views in pixels, (V, n, 4) int64."""
        reduced = self.reduced_jpeg and split is self.split and split.region == "full"
        decoded = [] if reduced else [split.image(i) for i in index.tolist()]
        shape = torch.tensor([split.size(i) for i in index.tolist()] if reduced else [i.shape[1:] for i in decoded])
        boxes = torch.stack(self.augmentation.crop_parameters(index, *shape.T, seed=self.seed, epoch=epoch))
        if reduced:
            room = (boxes[:, :, 2:].amin(-1) / torch.tensor(self.sizes)[:, None]).amin(0)
            if self.whole_images:
                room = room.minimum(shape.amin(1) / split.image_size)
            steps = room.log2().floor().clamp(0, 3).exp2().long().tolist()
            decoded = [split.image(i, step) for i, step in zip(index.tolist(), steps, strict=True)]
            scale = torch.tensor([image.shape[1:] for image in decoded]) / shape
            start, end = boxes[:, :, :2], boxes[:, :, :2] + boxes[:, :, 2:]
            start, end = (start * scale).round().long(), (end * scale).round().long()
            boxes = torch.cat([start, end - start], dim=-1)
        return decoded, boxes

    def _cut(self, rooms: Sequence[Tensor], part: slice, decoded: list[Tensor], boxes: Tensor) -> None:
        """Write the crops of the first views into their rooms, one view per room."""
        for room, of_view, recipe in zip(rooms, boxes.tolist(), self.augmentation.recipes, strict=False):
            size, mode = list(room.shape[2:]), InterpolationMode(recipe.interpolation)
            for row, image, box in zip(room[part], decoded, of_view, strict=True):
                row.copy_(F.resized_crop(image, *box, size, mode, antialias=True))
