"""The 16 classes of Geirhos et al. (ImageNet-trained CNNs are biased towards texture, ICLR 2019) in ImageNet's 1,000.

A class consists of the classes of ILSVRC-2012 below it in WordNet, without some that the authors left out. The sets are
taken from their repository, rgeirhos/texture-vs-shape, code/helper/human_categories.py. They contain 207 of the 1,000.
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
"""Numbers of ImageNet's classes in the usual order (of WordNet ids). Ranges include both ends."""


def members(ranges: str) -> list[int]:
    """Return the numbers in a text: `2 4-6` becomes 2, 4, 5, 6."""
    ends = [part.split("-") for part in ranges.split()]
    return [k for part in ends for k in range(int(part[0]), int(part[-1]) + 1)]


SIXTEEN: Mapping[str, list[int]] = {name: members(ranges) for name, ranges in RANGES.items()}
"""ImageNet's class numbers of each class, in the order of the names."""


def sixteen(scores: Tensor) -> Tensor:
    """Return the mean probability of each of the 16 classes (n, 16), from scores (n, 1000) before the softmax.

    The published rule takes the mean, not the sum, so that dog with its 109 breeds has no advantage over airplane.
    """
    probabilities = scores.double().softmax(1)
    return torch.stack([probabilities[:, numbers].mean(1) for numbers in SIXTEEN.values()], 1)
