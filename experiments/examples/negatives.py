"""Train with non-semantic negatives in a plain loop, without Lightning or Hydra: MoCo's loss on random images.

python experiments/examples/negatives.py
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_msr.core.randomness import keys
from icl_msr.negatives import PatchNegatives, PhaseNegatives, TextureNegatives

Generator = Callable[[Tensor, Tensor], Tensor]
N, K, TAU, ALPHA = 32, 256, 0.2, 2.0
READ_BY_LOSSES: dict[str, Any] = {
    "alpha": ALPHA,
    "alpha_mode": "exponent",
    "alpha_schedule": "constant",
    "repulsion": 0.25,
}
SIZES: dict[str, Any] = {
    "reference": 224,
    "count": 1,
}  # the sizes below are for 224 pixels and scale with the images
VARIANT: dict[str, Any] = {"shuffle": False, "flips": False, "rotations": False}
GENERATORS: dict[str, Generator] = {
    "patch": PatchNegatives(smallest=16, largest=72, **VARIANT, **SIZES, **READ_BY_LOSSES),
    "texture": TextureNegatives(
        example=96, block=36, overlap=6, candidates=64, tolerance=0.1, **SIZES, **READ_BY_LOSSES
    ),
    "phase": PhaseNegatives(count=1, **READ_BY_LOSSES),
}


def main() -> None:
    """Train with each generator and print the loss."""
    for name, negatives in GENERATORS.items():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16))
        query_encoder = nn.Sequential(*layers)
        key_encoder = copy.deepcopy(query_encoder)
        optimizer = torch.optim.SGD(query_encoder.parameters(), 0.1)
        queue = F.normalize(torch.randn(K, 16), dim=1)
        for step in range(20):
            index = torch.arange(N)  # position of each image in the data set, which determines its negatives
            first, second = torch.randn(2, N, 3, 32, 32)
            with torch.no_grad():
                t = negatives(first, keys(seed=0, epoch=step, index=index, view=-2))  # (N, m, 3, 32, 32)
                t = F.normalize(key_encoder(t.flatten(0, 1)), dim=1).view(N, -1, 16)
                k = F.normalize(key_encoder(second), dim=1)
            q = F.normalize(query_encoder(first), dim=1)
            positive, bank = (q * k).sum(1, keepdim=True), q @ queue.T
            own = ALPHA * torch.einsum("nd,nmd->nm", q, t)  # only with its own image, and never into the queue
            loss = F.cross_entropy(torch.cat([positive, bank, own], 1) / TAU, torch.zeros(N, dtype=torch.long))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            for mine, theirs in zip(key_encoder.parameters(), query_encoder.parameters(), strict=True):
                mine.data.lerp_(theirs.data, 0.01)
            queue = torch.cat([k, queue])[:K]
        print(f"{name:8} loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
