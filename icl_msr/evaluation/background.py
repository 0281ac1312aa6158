"""Differences of accuracies between test splits, which show how far an encoder relies on the background.

The splits are those of the ImageNet-9 backgrounds challenge (Xiao et al. 2021): `original`, `mixed_same` (background of
another image of the same class), `mixed_rand` (of any class), `only_fg`, `only_bg`; and, for sets with boxes
or masks, `full` and `fg` (ICL-MSR, motivating experiment), and `crop`, the control for the effect of cropping itself.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icl_msr.core.records import CHANCE
from icl_msr.evaluation.metrics import Bootstrap, Interval

GAPS = (
    ("mixed_same", "mixed_rand"),  # the published BG-gap
    ("original", "mixed_rand"),
    ("original", "only_fg"),
    ("only_bg", CHANCE),
    ("full", "fg"),
    ("fg", "crop"),
)
"""Pairs of splits. A gap is the accuracy on the first minus the accuracy on the second."""
WITHOUT_OBJECT = ("only_bg",)
"""Splits on which a high accuracy is neither good nor bad."""


def background_gaps(
    correct: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    chance: float,
    bootstrap: Bootstrap,
    shifted: Sequence[str] = (),
) -> dict[tuple[str, str], Interval]:
    """Return the gaps whose splits exist, in [-1, 1]: `GAPS`, and the first split minus each of the `shifted` ones.

    `correct` is bool (n,) and `labels` is int64 (n,), by split; `chance` is in [0, 1]. Splits with equal labels show
    the same objects (the contract of `Dataset`), so their difference is paired image by image.
    """
    gaps: dict[tuple[str, str], Interval] = {}
    usual = next(iter(correct))
    for first, second in dict.fromkeys([*GAPS, *((usual, other) for other in shifted)]):
        if first in correct and second == CHANCE:
            gaps[first, second] = Interval(*(value - chance for value in bootstrap.mean(correct[first])))
        elif first in correct and second in correct:
            paired = torch.equal(labels[first], labels[second])
            gaps[first, second] = bootstrap.difference(correct[first], correct[second], paired=paired)
    return gaps
