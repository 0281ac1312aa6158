"""The 16 classes of Geirhos et al. (ImageNet-trained CNNs are biased towards texture, ICLR 2019) in ImageNet's 1,000.

A class holds those of ILSVRC-2012 that lie below it in WordNet, less some that its authors left out. The sets are those
of their repository, rgeirhos/texture-vs-shape, code/helper/human_categories.py; 207 of the 1,000 are in one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

RANGES: Mapping[str, str] = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}
"""Numbers of ImageNet's classes, in the usual order (that of their WordNet ids), both ends of a range included."""


def members(ranges: str) -> list[int]:
    """`2 4-6` to 2, 4, 5, 6."""
    ends = [part.split("-") for part in ranges.split()]
    return [k for part in ends for k in range(int(part[0]), int(part[-1]) + 1)]


SIXTEEN: Mapping[str, list[int]] = {name: members(ranges) for name, ranges in RANGES.items()}
"""The classes in the order of their names, and the numbers of each."""


def sixteen(scores: Tensor) -> Tensor:
    """The mean probability of each of the 16: a classifier's scores (n, 1000) before the softmax to (n, 16).

    The mean, and not the sum, is the published rule: a dog of 109 breeds counts no more than an airplane of one.
    """
    probabilities = scores.double().softmax(1)
    return torch.stack([probabilities[:, numbers].mean(1) for numbers in SIXTEEN.values()], 1)
