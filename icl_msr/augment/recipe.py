"""Recipes of views and augmentations. An augmentation has one recipe per view."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, create_model
from torch import Tensor

from icl_msr.augment import colour, geometry, passes
from icl_msr.augment.passes import Parameters
from icl_msr.core.randomness import keys, uniforms


def ascending(interval: list[float]) -> list[float]:
    """Check that the first number is not larger than the second, for pydantic."""
    if interval[0] > interval[1]:
        raise ValueError(f"the first number of {interval} must not be larger than the second")
    return interval


def _strengths(jitter: list[float]) -> list[float]:
    if jitter[3] > 0.5:
        raise ValueError(f"the hue strength, the last of {jitter}, is in turns and must be at most 0.5")
    return jitter


def _changes(view: dict[str, Any]) -> dict[str, Any]:
    allowed = get_type_hints(Recipe, include_extras=True)
    for key in view:
        if key not in allowed:
            raise ValueError(f"a view has no key {key!r}; its keys are {', '.join(allowed)}")
    fields: dict[str, Any] = {key: (allowed[key], ...) for key in view}
    create_model("View", __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)(**view)
    return view


Interval = Annotated[list[PositiveFloat], Field(min_length=2, max_length=2), AfterValidator(ascending)]
Strengths = Annotated[list[NonNegativeFloat], Field(min_length=4, max_length=4), AfterValidator(_strengths)]
Probability = Annotated[float, Field(ge=0, le=1)]
Changes = Annotated[dict[str, Any], AfterValidator(_changes)]

# Positions of the random numbers of a key, by purpose. Results of old runs depend on them: append, never renumber.
_BOX, _FLIP, _JITTER, _FACTORS, _ORDER = slice(0, 22), 22, 23, slice(24, 28), slice(28, 32)
_GRAY, _BLUR, _SIGMA, _SOLARIZE, NUMBERS = 32, 33, 34, 35, 36


def _renderer(images: Tensor) -> Callable[[Tensor, Parameters, int, Tensor, Tensor, torch.memory_format], Tensor]:
    """Return what makes the views: compiled code for bytes on a CPU, if Numba is installed, or else passes of torch."""
    if images.device.type == "cpu" and images.dtype == torch.uint8:
        with suppress(ImportError):
            from icl_msr.augment import kernel  # here, because few programs make views

            return kernel.render
    return passes.render


@dataclass(kw_only=True)
class Recipe:
    """The recipe of one view: crop, flip, colour jitter, gray, blur, solarize, in this order.

    The crop is torchvision's `RandomResizedCrop` with antialiasing. The jitter is its `ColorJitter`, including the
    random order of its four parts. Everything is float32 and never rounded to 8 bits. The blur is a Gaussian with
    reflected borders that is not cut off at a kernel size.
    """

    scale: Interval
    """Smallest and largest share of the area that a crop shows."""
    ratio: Interval
    """Smallest and largest width / height of a crop."""
    interpolation: geometry.Interpolation
    """Filter that resizes a crop, with antialiasing."""
    flip: Probability
    """Probability of a horizontal flip."""
    jitter: Strengths
    """Strengths of brightness, contrast, saturation and hue."""
    jitter_probability: Probability
    """Probability that the colours are jittered."""
    gray: Probability
    """Probability of grayscale."""
    blur: Probability
    """Probability of a Gaussian blur."""
    sigma: Interval
    """Smallest and largest standard deviation of the blur, in pixels of the view."""
    solarize: Probability
    """Probability that values of at least one half are inverted."""
    size: PositiveInt | None
    """Side of the view in pixels; null: the image size of the data set."""

    def boxes(self, numbers: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
        """Return the part of each image that the view shows: int64 (N, 4), see `geometry.random_boxes`."""
        return geometry.random_boxes(numbers[:, _BOX], height, width, self.scale, self.ratio)

    def parameters(self, numbers: Tensor, boxes: Tensor | None) -> Parameters:
        """Return the parameters of a view of each image.

        Args:
            numbers: float32 (N, NUMBERS), uniform in [0, 1).
            boxes: int64 (N, 4), the crops. None: the images are already cropped.
        """

        def chosen(number: int, probability: float) -> Tensor | None:
            return numbers[:, number] < probability if probability > 0 else None

        jittered, blurred = chosen(_JITTER, self.jitter_probability), chosen(_BLUR, self.blur)
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * numbers[:, _SIGMA]
        return Parameters(
            boxes=boxes,
            interpolation=self.interpolation,
            flip=numbers[:, _FLIP] < self.flip,
            factors=None if jittered is None else self._factors(numbers[:, _FACTORS], jittered),
            order=None if jittered is None else numbers[:, _ORDER].argsort(1),
            gray=chosen(_GRAY, self.gray),
            sigma=None if blurred is None else sigma * blurred,
            solarize=chosen(_SOLARIZE, self.solarize),
        )

    def _factors(self, numbers: Tensor, jittered: Tensor) -> Tensor:
        columns = []
        for number, reach, neutral, least in zip(
            numbers.unbind(1), self.jitter, (1, 1, 1, 0), (0, 0, 0, -1), strict=True
        ):
            low, high = max(neutral - reach, least), neutral + reach
            columns.append(torch.where(jittered, low + (high - low) * number, neutral))
        return torch.stack(columns, 1)


@dataclass(kw_only=True)
class Augmentation(Recipe):
    """V views of each image. The keys of `Recipe` hold for all views, and `views` gives the differences of each.

    `views: [{}, {}]` are two views of one recipe. BYOL's two are `views: [{blur: 1.0}, {blur: 0.1, solarize: 0.2}]`; a
    small third crop is `views: [{}, {}, {size: 16, scale: [0.05, 0.2]}]`.

    Parameters depend only on (seed, epoch, index, view). So a view is the same in any batch, worker or rank, and the
    same call on other pictures, such as textures, transforms them alike.
    """

    views: Annotated[list[Changes], Field(min_length=1)]
    """One mapping per view: the keys of `Recipe` that differ in it, with their values."""

    def __post_init__(self) -> None:
        common = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        self.recipes = [Recipe(**(common | dict(changes))) for changes in self.views]

    def crop_parameters(
        self, index: Tensor, height: int | Tensor, width: int | Tensor, *, seed: int, epoch: int
    ) -> list[Tensor]:
        """Return the crops of each view for images of that size: V times int64 (N, 4) as (top, left, height, width).

        A worker that decodes photographs cuts out these boxes, so that whole photographs need not be sent.

        Args:
            index: int64 (N,), position of each image in the training split.
            height: of the images in pixels, one number for all or (N,).
            width: of the images in pixels, one number for all or (N,).
            seed: of the run.
            epoch: counted from 0.
        """
        return [
            recipe.boxes(uniforms(keys(seed, epoch, index, view), NUMBERS), height, width)
            for view, recipe in enumerate(self.recipes)
        ]

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor | Sequence[Tensor],
        index: Tensor,
        *,
        seed: int,
        epoch: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        cropped: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> list[Tensor]:
        """Return V normalised views, float32 (N, 3, s, s), on the device of the images.

        Args:
            images: uint8 (N, 3, H, W). If `cropped`, V such tensors (N, 3, s, s), the crops of each view.
            index: int64 (N,), position of each image in the training split, on the device of the images.
            seed: of the run.
            epoch: counted from 0.
            size: s in pixels of views whose recipe has none.
            mean: of the channels, for values in [0, 1].
            std: of the channels, for values in [0, 1].
            cropped: True if `crop_parameters` cut out the images and they were resized, but not flipped.
            memory_format: of the views.
        """
        device = index.device
        scale = 1 / colour.channels(tuple(std), device)
        shift = -colour.channels(tuple(mean), device) * scale
        views = []
        sources = [images] * len(self.recipes) if isinstance(images, Tensor) else images
        for view, (recipe, source) in enumerate(zip(self.recipes, sources, strict=True)):
            numbers = uniforms(keys(seed, epoch, index, view), NUMBERS)
            boxes = None if cropped else recipe.boxes(numbers, source.shape[2], source.shape[3])
            side = source.shape[3] if cropped else recipe.size or size
            render = _renderer(source)
            views.append(render(source, recipe.parameters(numbers, boxes), side, scale, shift, memory_format))
        return views
