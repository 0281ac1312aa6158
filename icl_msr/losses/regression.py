"""Losses that pull a prediction towards a target and need no negatives."""

import torch
from torch import Tensor

from icl_msr.losses.contrastive import full_precision, unit
from icl_msr.views import NonSemantic


@full_precision
def squared_distance(predictions: Tensor, targets: Tensor, negatives: NonSemantic | None = None) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos (BYOL; Grill et al. 2020, eq. 2), minus the repulsion.

    Non-semantic negatives push the prediction away: |p - z|^2 - alpha_r |p - z_t|^2, averaged over an image's m
    negatives. Ge et al. 2021 name the method; the formula is ours.

    Args:
        predictions, targets: (N, D).
        negatives: (N, m, D) target embeddings z_t of each image's negatives, and alpha_r as `repulsion`.

    Returns:
        () mean over images.
    """
    predictions = unit(predictions)
    loss = 2 - 2 * (predictions * unit(targets)).sum(1).mean()
    if negatives is not None:
        cosines = torch.einsum("nd,nmd->nm", predictions, unit(negatives.rows))
        loss = loss - negatives.repulsion * (2 - 2 * cosines.mean())
    return loss
