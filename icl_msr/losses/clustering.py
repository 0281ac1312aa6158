"""Losses that compare assignments to prototypes. N images, V views, D embedding, K prototypes, Q queued projections.

Scores are cosines between embeddings and prototypes. The first two views are the global ones. Every other view predicts
their assignments; no gradient flows through an assignment.
"""

import torch
from torch import Tensor

from icl_msr.core.distributed import gather
from icl_msr.losses.contrastive import full_precision, unit


@full_precision
def cosines(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Return scores (..., K) of embeddings (..., D) against prototypes (K, D), at least in fp32.

    The prototypes are normalised here, so that the scores are cosines for any value of the parameters.
    """
    return unit(embeddings) @ unit(prototypes).T


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, queued: Tensor | None = None) -> Tensor:
    """Return soft assignments that follow the scores and use all prototypes equally (SwAV; Caron et al. 2020, eq. 3-5).

    This is the Sinkhorn-Knopp algorithm on exp(scores / epsilon), computed with logarithms, so that no epsilon
    overflows. The batch is that of all ranks.

    Args:
        scores: (..., N, K), of this rank.
        epsilon: weight of the entropy, > 0. A smaller value gives harder assignments.
        iterations: number of times that both marginals are normalised.
        queued: (..., Q, K) scores of earlier images that take part; the same on all ranks.

    Returns:
        (..., N, K). Rows sum to 1. With enough iterations the columns of batch and queue sum to (M + Q) / K.
    """
    logs = scores / epsilon
    queue = scores[..., :0, :] if queued is None else queued / epsilon
    for _ in range(iterations):
        parts = [gather(logs.logsumexp(-2)[None]), queue.logsumexp(-2)[None]]  # (W, ..., K) and (1, ..., K)
        mass = torch.cat(parts).logsumexp(0).unsqueeze(-2)
        logs, queue = (logs - mass).log_softmax(-1), (queue - mass).log_softmax(-1)
    return logs.exp()


@full_precision
def swapped_prediction(
    scores: Tensor, temperature: float, epsilon: float, iterations: int, queued: Tensor | None = None
) -> Tensor:
    """Return the loss of views that predict each other's assignments (SwAV; Caron et al. 2020, eq. 1 and 2).

    Args:
        scores: (V, N, K).
        temperature: tau > 0 of the predictions.
        epsilon, iterations: see `sinkhorn`.
        queued: (2, Q, K) scores of the queues of both global views.

    Returns:
        () mean over images and the 2 (V - 1) pairs of views.
    """
    return _across_views(sinkhorn(scores[:2], epsilon, iterations, queued), scores / temperature)


@full_precision
def self_distillation(
    student: Tensor, teacher: Tensor, centre: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the loss of a student that predicts the teacher's other global views (DINO; Caron et al. 2021, eq. 1-3).

    Args:
        student: (V, N, K) scores.
        teacher: (2, N, K) scores of the global views.
        centre: (K,), subtracted from the teacher's scores, so that no prototype dominates.
        temperature: tau_s > 0.
        teacher_temperature: tau_t > 0. A lower value sharpens the target.

    Returns:
        () mean over images and the 2 (V - 1) pairs of views.
    """
    assignments = ((teacher - centre) / teacher_temperature).softmax(-1)
    return _across_views(assignments.detach(), student / temperature)


def _across_views(assignments: Tensor, logits: Tensor) -> Tensor:
    """Return the mean cross entropy of assignments (2, N, K) with the logits (V, N, K) of all other views."""
    views, n = logits.shape[:2]
    terms = -torch.einsum("gnk,vnk->gv", assignments, logits.log_softmax(-1)) / n
    return (terms.sum() - terms.diagonal().sum()) / (2 * (views - 1))
