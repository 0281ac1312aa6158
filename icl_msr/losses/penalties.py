"""Penalties on the relations within a batch, added to a contrastive loss. N images, D embedding, M = N x ranks.

They need every similarity, not only the log-sum-exp. To save memory, they handle a chunk of anchors at a time and
compute the similarities again in the backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from icl_msr.core.distributed import gather
from icl_msr.losses import contrastive
from icl_msr.losses.contrastive import full_precision, unit


def _summed(term: Callable[..., Tensor], width: int, *anchors: Tensor) -> Tensor:
    """Return the sum of `term(*anchors)` over chunks of the anchors, each compared with `width` others."""
    parts = zip(*(torch.split(a, max(1, contrastive.CHUNK // width)) for a in anchors), strict=True)
    sums = [checkpoint(term, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum()


@full_precision
def polarization(first: Tensor, second: Tensor, delta_plus: float, delta_minus: float) -> Tensor:
    """Return the distance polarization of LMCL: pairs should be near or far, not in between (Chen et al. 2021).

    It is || min((D - delta+) (D - delta-), 0) ||_1, element by element, over the pairwise distances D of a batch.
    Distances between delta+ and delta- are pushed to the nearer end. Ours: D = (1 - cos) / 2 lies in [0, 1], and the
    mean over pairs replaces the sum, so that the weight means the same for any batch size.

    Args:
        first, second: (N, D) embeddings of the two views.
        delta_plus, delta_minus: 0 <= delta+ < delta- <= 1.

    Returns:
        () mean over the 2N local views of the mean over the 2M - 1 other views of the batch.
    """
    views = torch.cat([unit(first), unit(second)])
    everyone = gather(views)

    def hump(part: Tensor) -> Tensor:  # the distance of a view to itself is 0 and adds nothing
        distances = (1 - part @ everyone.T) / 2
        return (delta_plus - distances).mul(distances - delta_minus).clamp(min=0).sum()

    return _summed(hump, len(everyone), views) / (len(views) * (len(everyone) - 1))


@full_precision
def invariance(first: Tensor, second: Tensor, first_keys: Tensor, second_keys: Tensor, temperature: float) -> Tensor:
    """Return the invariance penalty of ReLIC: both views should identify an image alike (Mitrovic et al. 2021).

    p(j | i) is the softmax over the batch of z_i.k_j / tau, with anchors of the first view and keys of the second. q is
    the same with the views exchanged.

    Args:
        first, second: (N, D) anchors of the two views.
        first_keys, second_keys: (N, D) their targets. An anchor is compared with all M keys of the other view.
        temperature: tau > 0.

    Returns:
        () mean over images and over both orders of KL(p, q) and KL(q, p).
    """
    to_second, to_first = gather(unit(second_keys)), gather(unit(first_keys))

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        log_p = torch.log_softmax(a @ to_second.T / temperature, dim=1)
        log_q = torch.log_softmax(b @ to_first.T / temperature, dim=1)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()

    return _summed(divergence, len(to_first), unit(first), unit(second)) / (2 * len(first))
