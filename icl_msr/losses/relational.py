"""Losses that compare how an image relates to other images. N images, D embedding, K bank."""

import torch.nn.functional as F
from torch import Tensor

from icl_msr.losses.contrastive import full_precision, unit


@full_precision
def relation(
    students: Tensor, teachers: Tensor, bank: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the cross entropy of the teacher's and the student's relation to a bank (ReSSL; Zheng et al. 2021, 3.2).

    A relation is softmax(z.bank / tau). The divergence of the two relations is this cross entropy minus the teacher's
    entropy, a constant that is left out.

    Args:
        students, teachers: (N, D) embeddings of the same images.
        bank: (K, D) embeddings of other images.
        temperature: tau_s > 0.
        teacher_temperature: tau_t > 0; lower than tau_s, so that the target is sharper.

    Returns:
        () mean over images; no gradient reaches teachers or bank.
    """
    bank = unit(bank).detach()
    targets = (unit(teachers) @ bank.T / teacher_temperature).softmax(1)
    return F.cross_entropy(unit(students) @ bank.T / temperature, targets.detach())
