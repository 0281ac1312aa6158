"""Strata: soft subsets of feature channels. Each image has n weight vectors a_t of unit length.

N images, S strata (the paper's n), c channels.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_msr.core.distributed import average
from icl_msr.core.randomness import permutation


class StrataNetwork(nn.Module):
    """f_msr, a network from un-augmented images to strata.

    The paper says only "a convolutional network". Ours is a trunk of four strided convolutions with GroupNorm, a pool
    and a LayerNorm, followed by a linear layer, a sigmoid and normalisation to unit length over the channels. GroupNorm
    and LayerNorm make A(X) depend on its own image only. `head_scale` multiplies the linear layer's initial weights:
    the larger it is, the more A differs between images.
    """

    def __init__(self, channels: int, strata: int, width: int, image_size: int, head_scale: float = 1.0):
        super().__init__()
        self.strata, self.image_size = strata, image_size
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        blocks: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            blocks += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.GroupNorm(8, wide), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.norm = nn.LayerNorm(widths[-1], elementwise_affine=False)
        self.head = nn.Linear(widths[-1], strata * channels)
        with torch.no_grad():
            self.head.weight.mul_(head_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Return A (N, S, c), non-negative and of unit length, of normalised images (N, 3, H, W)."""
        return self.assign(self.look(images))

    def look(self, images: Tensor) -> Tensor:
        """Return the trunk's features (N, 4 width) of normalised images (N, 3, H, W)."""
        if images.shape[-1] > self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        seen: Tensor = self.norm(self.trunk(images))
        return seen

    def assign(self, seen: Tensor) -> Tensor:
        """Return A (N, S, c) from the trunk's features (N, 4 width)."""
        logits = self.head(seen).reshape(len(seen), self.strata, -1)
        return F.normalize(torch.sigmoid(logits.float() if logits.dtype.itemsize < 4 else logits), dim=-1)


def random_partition(channels: int, strata: int, seed: int) -> Tensor:
    """Return disjoint channel subsets of (almost) equal size, fixed by the seed: (S, c), rows of unit length.

    They are an optimum of the uniformity loss. So they are the control for "learned strata against arbitrary ones".
    """
    owner = permutation(seed, 0, channels) % strata
    return F.normalize(F.one_hot(owner, strata).T.double(), dim=1).float()


def uniformity(strata: Tensor, u: float) -> Tensor:
    """Return L_uni () of ICL-MSR (eq. 9): log sum_{s,t} exp(2 u a_s.a_t - 2 u), s = t included, averaged over images.

    Args:
        strata: (N, S, c), rows of unit length. For these L_uni is the logarithm of a Gaussian potential.
        u: sharpness of the potential; 2 in the paper.
    """
    gram = strata @ strata.mT  # (N, S, S)
    return torch.logsumexp((2 * u * gram - 2 * u).flatten(1), dim=1).mean()


def uniform(channels: int) -> Tensor:
    """Return one stratum (1, c) of unit length that weights all channels equally."""
    return torch.full((1, channels), 1 / math.sqrt(channels))


@torch.no_grad()
def diversity(strata: Tensor) -> dict[str, Tensor]:
    """Return how much the strata (N, S, c) of a batch differ, as three numbers () in [0, 1].

    * `entropy` of a_t^2 over the channels, divided by log c: 1 is uniform, 0 is a single channel.
    * `overlap`: mean cosine of two strata of an image; left out if there is only one stratum.
    * `variation`: 1 minus the squared length of the mean a_t over the images of all ranks; 0 if every image has the
      same strata.
    """
    count, channels = strata.shape[1:]
    shares = strata.square()
    found = {"entropy": -torch.special.xlogy(shares, shares).sum(-1).mean() / math.log(channels)}
    if count > 1:
        first, second = torch.triu_indices(count, count, 1, device=strata.device)
        found["overlap"] = (strata @ strata.mT)[:, first, second].mean()
    mean = average([strata.mean(0)])[0]  # (S, c)
    found["variation"] = (1 - mean.square().sum(-1).mean()).clamp(min=0)
    return found
