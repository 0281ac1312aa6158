"""Losses that pull a prediction towards a target without negatives, and the repulsion of non-semantic negatives."""

import torch
from torch import Tensor

from icl_msr.core.views import NonSemantic
from icl_msr.losses.contrastive import full_precision, unit


@full_precision
def squared_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the squared distance of unit vectors, 2 - 2 cos (BYOL; Grill et al. 2020, eq. 2).

    Args:
        predictions, targets: (N, D).

    Returns:
        () mean over images.
    """
    return 2 - 2 * (unit(predictions) * unit(targets)).sum(1).mean()


@full_precision
def repulsion(embeddings: Tensor, negatives: NonSemantic | None) -> Tensor:
    """Return alpha_r |e - e_t|^2 of unit vectors, the term that a loss without negatives subtracts.

    Ge et al. 2021 propose the idea for BYOL; the formula is ours.

    Args:
        embeddings: (N, D).
        negatives: (N, m, D) embeddings e_t of each image's non-semantic negatives, with alpha_r as `repulsion`.

    Returns:
        () mean over images and their negatives; 0 without negatives.
    """
    if negatives is None:
        return embeddings.new_zeros(())
    cosines = torch.einsum("nd,nmd->nm", unit(embeddings), unit(negatives.rows))
    return negatives.repulsion * (2 - 2 * cosines.mean())
