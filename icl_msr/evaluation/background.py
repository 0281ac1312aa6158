"""How far does an encoder rely on the background? Differences of accuracies between test splits.

The splits are those of the ImageNet-9 backgrounds challenge (Xiao et al. 2021): `original`, `mixed_same` (background of
another image of the same class), `mixed_rand` (of any class), `only_fg`, `only_bg`; and, for sets with boxes
or masks, `full` and `fg` (ICL-MSR, motivating experiment), and `crop`, the control for what cropping itself does.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icl_msr.evaluation.metrics import Bootstrap, Interval

GAPS: Mapping[str, tuple[str, str]] = {
    "bg_gap": ("mixed_same", "mixed_rand"),  # the published BG-gap
    "original - mixed_rand": ("original", "mixed_rand"),
    "original - only_fg": ("original", "only_fg"),
    "only_bg - chance": ("only_bg", "chance"),
    "full - fg": ("full", "fg"),
    "fg - crop": ("fg", "crop"),
}
"""Name of a gap: the accuracy on the first split minus the accuracy on the second."""


def background_gaps(
    correct: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    chance: float,
    bootstrap: Bootstrap,
    shifted: Sequence[str] = (),
) -> dict[str, Interval]:
    """Every gap whose splits exist, in [-1, 1]: those of `GAPS`, and the first split minus each of the `shifted` ones.

    `correct` bool (n,) and `labels` int64 (n,) by split; `chance` in [0, 1]. Splits with equal labels
    show the same objects (the contract of `Dataset`): their difference is paired image by image.
    """
    gaps: dict[str, Interval] = {}
    usual = next(iter(correct))
    for name, (first, second) in {**GAPS, **{f"{usual} - {other}": (usual, other) for other in shifted}}.items():
        if first in correct and second == "chance":
            gaps[name] = Interval(*(value - chance for value in bootstrap.mean(correct[first])))
        elif first in correct and second in correct:
            paired = torch.equal(labels[first], labels[second])
            gaps[name] = bootstrap.difference(correct[first], correct[second], paired=paired)
    return gaps
