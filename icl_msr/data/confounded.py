"""The embedded data set: shapes on procedural textures. In train, the texture gives the class away.

K object classes are drawn on K families of background. Family k belongs to class k: in train and in the test split
`original` the background comes from the family of the object's class with probability rho, and from one of the other
families otherwise. The other test splits show the same objects as `original`, as in the ImageNet-9 backgrounds
challenge (Xiao et al., "Noise or Signal", ICLR 2021):

    mixed_same   on another background of the family of the object's class
    mixed_rand   on a background of a family drawn uniformly at random
    only_fg      on black
    only_bg      the background of `original` without the object; the label is still the object's class
    fg           `original` cropped to the square box around the object

The attribute of the groups is the background: of the class's own family, or of another one. So there are 2 K groups.

Neither colour nor size nor place says anything about class or family. A background is darker than a bright object and
brighter than a dark one, the same way in all splits. Every number comes from `icl_msr.core.randomness` and float64
arithmetic that is rounded to uint8 at the end, so that a seed gives the same bytes everywhere.

Difficulty, measured once with the default settings (a small ResNet of 128 features and 0.012 GMAC, Adam 3e-3, batch
about 250, accuracy in %, chance 10; 1,000 images a split, so 1 to 1.6 points of standard error):

                                              original  mixed_same  mixed_rand  only_fg  only_bg  fg
    untrained, kNN (k = 20, mean of 3 seeds)        20          20          15       11       13   6
    SimCLR, 15 epochs, kNN                          53          54          34       15       12  26
    supervised on rho = 0.9, 12 epochs              98          99          82       53       37  46
    supervised on rho = 1/K, 12 epochs              98          98          98       54       10  53

The last row takes about a minute on one core. `only_fg` and `fg` are also a shift away from what was trained on.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.memory import require_memory
from icl_msr.core.randomness import integers, keys, permutation, uniforms
from icl_msr.core.storage import read_arrays, require_local
from icl_msr.core.terminal import progress_bar
from icl_msr.data.crops import boxes_around, crop_to_boxes, square_boxes
from icl_msr.data.dataset import ArraySplit, Attribute, Dataset

VERSION = 1
"""Version of the generator. It is raised when any pixel changes, which invalidates the cached sets."""

MEAN = (0.50, 0.50, 0.50)
STD = (0.27, 0.27, 0.27)
"""Channel means and standard deviations of `train`, measured with seed 0 at 32 pixels."""

# ---------------------------------------------------------------------------------------------------------- objects
# A shape is a signed distance (negative inside) at x, y (N, S, S), in units of the object's radius.


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.85


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.74


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack(_half_planes(x, y, 3, 0.54)).amax(0)


def _star(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack(_half_planes(x, y, 5, 0.32)).topk(2, dim=0).values[1]  # a pentagram lies inside 4 of 5 lines


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.68).abs() - 0.22


def _cross(x: Tensor, y: Tensor) -> Tensor:
    short, long = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return torch.maximum(short - 0.28, long - 0.95)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    x = x - 0.15
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.77 - torch.hypot(x - 0.5, y))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    u, v = (x + y) * math.sqrt(0.5), (y - x) * math.sqrt(0.5)
    lobes = torch.minimum(torch.hypot(u - 0.52, v), torch.hypot(u, v - 0.52))
    return torch.minimum(torch.maximum(u.abs(), v.abs()), lobes) - 0.52


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum((0.8 * x + y.abs() - 0.8) / math.hypot(0.8, 1), -x)
    shaft = torch.maximum((x + 0.3).abs() - 0.65, y.abs() - 0.22)
    return torch.minimum(head, shaft)


def _hourglass(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum((y.abs() - 0.8 * x.abs() - 0.08) / math.hypot(0.8, 1), x.abs() - 0.85)


def _half_planes(x: Tensor, y: Tensor, n: int, inradius: float) -> list[Tensor]:
    turns = (2 * math.pi * k / n for k in range(n))
    return [x * math.cos(turn) + y * math.sin(turn) - inradius for turn in turns]


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
"""The classes: class k is the k-th shape."""

# ------------------------------------------------------------------------------------------------------ backgrounds
# A texture is a field in [0, 1] at u, v (N, S, S), in units of its period. It depends on uniforms r (N, 16, 1, 1) and
# on the width of a pixel in the same units, `px` (N, 1, 1). Its edges are smoothed over this width.


def _stripes(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    return _step(_wave(u) - (r[:, 0] - 0.5), 2 * math.pi * px)


def _checks(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    a, b = _step(_wave(u / 1.5), 4 * px), _step(_wave(v / 1.5), 4 * px)
    return a * b + (1 - a) * (1 - b)


def _dots(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    return _step(0.25 + 0.1 * r[:, 0] - torch.hypot(u - u.round(), v - v.round()), px)


def _waves(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    bend = (0.35 + 0.15 * r[:, 0]) * _wave(v / 2)
    return _step(_wave(u + bend), 8 * px)


def _bricks(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    u = u / 2 + 0.5 * v.floor()
    joint = torch.minimum((u - u.round()).abs() * 2, (v - v.round()).abs())
    return _step(joint - (0.07 + 0.05 * r[:, 0]), px)


def _clouds(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    field = torch.zeros_like(u)
    for k in range(5):
        turn = 2 * math.pi * (r[:, 3 * k] + k) / 5
        field += _wave((u * torch.cos(turn) + v * torch.sin(turn)) * (0.25 + 0.4 * r[:, 3 * k + 1]) + r[:, 3 * k + 2])
    return _step(field, torch.full_like(px, 4))


def _plaid(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    narrow = 0.3 * r[:, 0]
    return (_step(_wave(u / 1.3) - narrow, 5 * px) + _step(_wave(v / 1.3) - narrow, 5 * px)) / 2


def _rings(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    return _step(_wave(torch.hypot(u, v)), 2 * math.pi * px)


def _grain(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    turn = u / 1.4 + 0.2 * _wave(v / 5 + r[:, 0]) + 0.1 * _wave(v / 3 + u / 4 + r[:, 1])
    ramp = turn - turn.floor()
    return torch.minimum(ramp, (1 - ramp) / (2 * px)).clamp(max=1)


def _triangles(u: Tensor, v: Tensor, r: Tensor, px: Tensor) -> Tensor:
    a, b = math.pi * u / 1.1, math.pi * (u / 2 + v * math.sqrt(0.75)) / 1.1
    return _step(torch.sin(a) * torch.sin(b) * torch.sin(b - a), 2.4 * px)


def _wave(turns: Tensor) -> Tensor:
    return torch.cos(2 * math.pi * turns)


def _step(distance: Tensor, width: Tensor) -> Tensor:
    return (0.5 + distance / width).clamp(0, 1)


FAMILIES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "waves": _waves,
    "bricks": _bricks,
    "clouds": _clouds,
    "plaid": _plaid,
    "rings": _rings,
    "grain": _grain,
    "triangles": _triangles,
}
"""The background families: family k belongs to class k."""


def draw_objects(key: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Draw objects from keys and labels (N,): float64 colours (N, 3, S, S) and coverage (N, 1, S, S) in [0, 1]."""
    r = _spread(key, 24)
    x, y = _pixels(size)
    radius = 0.22 + 0.12 * r[:, 0]
    x = x - 0.5 - (r[:, 1] - 0.5) * (1 - 2.2 * radius)
    y = y - 0.5 - (r[:, 2] - 0.5) * (1 - 2.2 * radius)
    x, y = _turn(x / radius, y / radius, r[:, 3])
    stretch = 0.9 + 0.2 * r[:, 4]
    distance = _grouped(list(SHAPES.values()), labels, x * stretch, y / stretch)
    coverage = (0.5 - distance * radius * size).clamp(0, 1)

    light = torch.where(_is_bright(key), 0.66 + 0.22 * r[:, 6, 0, 0], 0.2 + 0.22 * r[:, 6, 0, 0]).view(-1, 1, 1)
    shade = 0.12 * _turn(x, y, r[:, 7])[0]
    inner = 0.08 * r[:, 8] * _wave(_turn(x, y, r[:, 9])[0] * (0.5 + r[:, 10]) + r[:, 11])
    return _colour(light + shade + inner, r[:, 12], r[:, 13]), coverage[:, None]


def draw_backgrounds(key: Tensor, families: Tensor, behind: Tensor, size: int) -> Tensor:
    """Draw backgrounds of families (N,) behind the objects with the keys `behind`: float64 (N, 3, S, S) in [0, 1]."""
    r = _spread(key, 32)
    x, y = _pixels(size)
    period = 0.16 + 0.12 * r[:, 0]
    u, v = _turn((x - r[:, 1]) / period, (y - r[:, 2]) / period, r[:, 3])
    field = _grouped(list(FAMILIES.values()), families, u, v, r[:, 16:], 1 / (size * period))[:, None]

    light = torch.where(_is_bright(behind).view(-1, 1, 1), 0.2 + 0.12 * r[:, 4], 0.68 + 0.12 * r[:, 4])
    contrast = (0.1 + 0.05 * r[:, 5]) * torch.where(r[:, 6] < 0.5, -1.0, 1.0)
    slope = 0.06 * _turn(x - 0.5, y - 0.5, r[:, 7])[0]
    first = _colour(light + contrast + slope, r[:, 8], r[:, 9])
    second = _colour(light - contrast + slope, r[:, 10], r[:, 11])
    return first + (second - first) * field


def _is_bright(key: Tensor) -> Tensor:
    return uniforms(key, 1, first=23)[:, 0] < 0.5


def _spread(key: Tensor, slots: int) -> Tensor:
    return uniforms(key, slots).double()[:, :, None, None]


def _pixels(size: int) -> tuple[Tensor, Tensor]:
    """Return x (1, 1, S) and y (1, S, 1) of the pixels' centres, in units of the image's side."""
    centres = (torch.arange(size).double() + 0.5) / size
    return centres.view(1, 1, size), centres.view(1, size, 1)


def _turn(x: Tensor, y: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    return x * cos + y * sin, y * cos - x * sin


def _colour(light: Tensor, hue: Tensor, chroma: Tensor) -> Tensor:
    """Return colours (N, 3, S, S) of mean `light` (N, S, S), with hue in turns and chroma in [0, 1), both (N, 1, 1)."""
    thirds = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=torch.float64).view(1, 3, 1, 1)
    return (light[:, None] + (0.05 + 0.15 * chroma)[:, None] * _wave(hue[:, None] - thirds)).clamp(0, 1)


def _grouped(functions: list[Callable[..., Tensor]], group: Tensor, *arguments: Tensor) -> Tensor:
    """Apply the function `group[i]` to image i of the arguments."""
    out = torch.empty_like(arguments[0])
    for k, function in enumerate(functions):
        members = (group == k).nonzero()[:, 0]
        out[members] = function(*(argument[members] for argument in arguments))
    return out


# ------------------------------------------------------------------------------------------------------ the data set

_SPLITS = ("train", "balanced", "test")
_OBJECT, _FAMILY, _BACKGROUND, _SAME, _RANDOM, _ORDER = range(1 << 16, (1 << 16) + 6)  # not used by training


class Scenes(NamedTuple):
    """The content of a split: N images, drawn from the random stream of `split`."""

    split: int
    labels: Tensor
    """Classes of the objects, (N,) int64."""
    families: Tensor | None
    """Background families, (N,) int64; None for black."""
    stream: int
    """Random stream of the backgrounds. Splits with the same families and the same stream share their backgrounds."""
    has_objects: bool = True


def scenes(seed: int, classes: int, train: int, balanced: int, test: int, rho: float) -> dict[str, Scenes]:
    """Return the contents of all splits. `confounded` explains the parameters."""
    plan: dict[str, Scenes] = {}
    for split, (count, agreement) in enumerate([(train, rho), (balanced, 1 / classes), (test, rho)]):
        labels = permutation(seed, _ORDER + split, count) % classes
        key = keys(seed, split, torch.arange(count), _FAMILY)
        other = (labels + 1 + integers(key, 1, first=1)[:, 0] % (classes - 1)) % classes
        families = torch.where(uniforms(key, 1)[:, 0].double() < agreement, labels, other)
        if _SPLITS[split] != "test":
            plan[_SPLITS[split]] = Scenes(split, labels, families, _BACKGROUND)
            continue
        plan["original"] = Scenes(split, labels, families, _BACKGROUND)
        plan["mixed_same"] = Scenes(split, labels, labels, _SAME)
        plan["mixed_rand"] = Scenes(split, labels, integers(key, 1, first=2)[:, 0] % classes, _RANDOM)
        plan["only_fg"] = Scenes(split, labels, None, _BACKGROUND)
        plan["only_bg"] = Scenes(split, labels, families, _BACKGROUND, has_objects=False)
    return plan


def draw(seed: int, content: Scenes, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the images `index` (n,) of a split, uint8 (n, 3, S, S), and the masks of their objects, bool (n, S, S)."""
    labels = content.labels[index]
    key = keys(seed, content.split, index, _OBJECT)
    colours, coverage = draw_objects(key, labels, size)
    image = torch.zeros_like(colours)
    if content.families is not None:
        image = draw_backgrounds(keys(seed, content.split, index, content.stream), content.families[index], key, size)
    if content.has_objects:
        image = image + (colours - image) * coverage
    return (image * 255 + 0.5).floor().to(torch.uint8), coverage[:, 0] >= 0.5


def confounded(
    *,
    seed: NonNegativeInt,
    image_size: Annotated[int, Field(ge=16)],
    classes: Annotated[int, Field(ge=2, le=len(SHAPES))],
    train: PositiveInt,
    balanced: PositiveInt,
    test: PositiveInt,
    rho: Annotated[float, Field(ge=0, le=1)],
    train_on: Literal["full", "fg"],
    cache: str | None,
) -> Dataset:
    """Generate the data set, or read it from the folder `cache` if it is there.

    All splits but `only_bg` have masks. They are true where at least half of a pixel is object.

    Args:
        seed: seed of the data. It is independent of the run's seed.
        image_size: side of the images, in pixels.
        classes: number of object classes and of background families.
        train: number of images of the split `train`.
        balanced: number of images of the split `balanced`.
        test: number of images of each test split.
        rho: probability in [1 / classes, 1] that background and class agree. At 1 / classes the background says nothing
            about the class, as in `balanced`.
        train_on: `full`, or `fg` to cut the images of `train`, and of no other split, to their objects.
        cache: folder that keeps the generated set; None generates it anew.

    Raises:
        UserError: `rho` is out of range, or the cache cannot be written.
    """
    if not 1 / classes - 1e-3 <= rho <= 1:
        raise UserError(
            f"dataset.rho={rho:g} is out of range: with {classes} classes it lies in [{1 / classes:.3g}, 1]; "
            f"type dataset.rho={1 / classes:.3g} for backgrounds that say nothing about the class."
        )
    images = train + balanced + 6 * test
    require_memory(
        f"{images} images of {image_size} pixels", 4.0 * images * image_size**2, "make fewer or smaller ones"
    )
    plan = scenes(seed, classes, train, balanced, test, rho)
    recipe = [VERSION, seed, image_size, classes, train, balanced, test, rho]
    arrays = _cached(cache, recipe, lambda: _generate(seed, plan, image_size))

    splits = {name: ArraySplit(arrays[name], plan[name].labels, arrays[f"{name}_masks"]) for name in plan}
    splits["only_bg"].masks = None
    splits["fg"] = _cut(splits["original"])
    seen = {name: plan[name] for name in plan if plan[name].has_objects}
    foreign = {name: (s.families != s.labels).long() for name, s in seen.items() if s.families is not None}
    return Dataset(
        name="confounded",
        classes=list(SHAPES)[:classes],
        image_size=image_size,
        train=_cut(splits["train"]) if train_on == "fg" else splits["train"],
        balanced=splits["balanced"],
        tests={name: split for name, split in splits.items() if name not in ("train", "balanced")},
        mean=MEAN,
        std=STD,
        attribute=Attribute("background", ["own background", "other background"], foreign),
    )


def _cut(split: ArraySplit) -> ArraySplit:
    """Crop images and masks to the square box around the object."""
    assert split.masks is not None
    size = split.images.shape[-1]
    boxes = square_boxes(boxes_around(split.masks), size)
    masks = crop_to_boxes(split.masks[:, None].to(torch.uint8) * 255, boxes, size)[:, 0] >= 128
    return ArraySplit(crop_to_boxes(split.images, boxes, size), split.labels, masks)


def _generate(seed: int, plan: Mapping[str, Scenes], size: int) -> dict[str, Tensor]:
    """Draw the images and masks of all splits."""
    batch = max(1, (1 << 17) // size**2)  # small temporaries stay in the processor's cache: several times faster
    total = sum(len(content.labels) for content in plan.values())
    arrays: dict[str, Tensor] = {}
    with progress_bar(shown=total * size**2 >= 1 << 24) as progress:
        task = progress.add_task("Drawing the data set", total=total)
        for name, content in plan.items():
            drawn = []
            for index in torch.split(torch.arange(len(content.labels)), batch):
                drawn.append(draw(seed, content, index, size))
                progress.advance(task, len(index))
            images, masks = zip(*drawn, strict=True)
            arrays[name], arrays[f"{name}_masks"] = torch.cat(images), torch.cat(masks)
    return arrays


def _cached(folder: str | None, recipe: object, generate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the result of `generate`. It is kept in a file of the folder, named by a hash of the recipe."""
    if folder is None:
        return generate()
    require_local(folder, "dataset.cache")
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    path = Path(folder) / f"confounded-{digest[:16]}.npz"
    with suppress(Exception):  # a missing or damaged file is made again
        return {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    arrays = generate()
    unfinished = path.with_suffix(f".{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(unfinished, allow_pickle=False, **{name: array.numpy() for name, array in arrays.items()})
        unfinished.replace(path)  # atomic, so no other process sees half a file
    except OSError as error:
        raise UserError(
            f"dataset.cache={folder} cannot be written ({error.strerror}): name another folder, "
            "or type dataset.cache=null to draw the data set anew in every run."
        ) from error
    return arrays
