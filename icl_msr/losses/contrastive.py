"""InfoNCE and its relatives. N images, D embedding, K bank, M = N x ranks, m non-semantic negatives an image.

Embeddings need not be normalised; the functions normalise them and compute in (at least) fp32. Non-semantic negatives
follow Ge et al. 2021 (NeurIPS), section 3: they are compared with their own image only, and alpha multiplies their
similarity inside the exponent.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from icl_msr.distributed import gather, rank
from icl_msr.views import NonSemantic

Arguments = ParamSpec("Arguments")


def full_precision(loss: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Switches autocast off inside: a similarity matrix in bf16 has two digits, too few for a low temperature."""

    @wraps(loss)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*args, **kwargs)

    return wrapped


def unit(embeddings: Tensor) -> Tensor:
    """Rows of unit length, at least in fp32: (..., D) to (..., D)."""
    return F.normalize(embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings, dim=-1)


def non_semantic_logits(anchors: Tensor, negatives: NonSemantic) -> Tensor:
    """alpha q.t for every anchor and its own negatives: unit anchors (N, D) to (N, m)."""
    return negatives.alpha * torch.einsum("nd,nmd->nm", anchors, unit(negatives.rows))


@full_precision
def nt_xent(first: Tensor, second: Tensor, temperature: float, negatives: NonSemantic | None = None) -> Tensor:
    """NT-Xent of SimCLR (Chen et al. 2020, eq. 1): each view against the 2M - 1 other views of the global batch.

    Args:
        first, second: (N, D) embeddings of the two views.
        temperature: tau > 0.
        negatives: m further logits for each of the two anchors of an image.

    Returns:
        () mean over the 2N local anchors.
    """
    n = len(first)
    anchors = unit(torch.cat([first, second]))  # (2N, D)
    everyone = torch.cat([gather(anchors[:n]), gather(anchors[n:])])  # (2M, D)
    m = len(everyone) // 2
    row = torch.arange(n, device=anchors.device) + rank() * n
    itself = torch.cat([row, row + m])
    positive = torch.cat([row + m, row])
    logits = (anchors @ everyone.T).scatter(1, itself[:, None], float("-inf"))
    if negatives is not None:
        twice = torch.cat([non_semantic_logits(view, negatives) for view in anchors.chunk(2)])
        logits = torch.cat([logits, twice], dim=1)
    return F.cross_entropy(logits / temperature, positive)


@full_precision
def info_nce(
    anchors: Tensor, positives: Tensor, bank: Tensor, temperature: float, negatives: NonSemantic | None = None
) -> Tensor:
    """InfoNCE against a bank of negatives (MoCo; He et al. 2020, eq. 1; Ge et al. 2021, eq. 3).

    Args:
        anchors, positives: (N, D) queries and their keys.
        bank: (K, D) negatives shared by all anchors.
        temperature: tau > 0.
        negatives: m further logits for each anchor.

    Returns:
        () mean over the anchors of -log softmax([q.k+, q.bank, alpha q.t] / tau) at q.k+.
    """
    anchors = unit(anchors)
    logits = [(anchors * unit(positives)).sum(1, keepdim=True), anchors @ unit(bank).T]
    if negatives is not None:
        logits.append(non_semantic_logits(anchors, negatives))
    stacked = torch.cat(logits, dim=1) / temperature
    return F.cross_entropy(stacked, torch.zeros(len(stacked), dtype=torch.long, device=stacked.device))
