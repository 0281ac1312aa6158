"""Implicit feature modification: Robinson et al. Can Contrastive Learning Avoid Shortcut Solutions? NeurIPS 2021.

The positive and the negatives of an anchor are moved by epsilon in the direction that makes the comparison hardest. On
unit vectors this lowers the positive's similarity by epsilon and raises each negative's (arXiv 2106.11230, section 3):

    L_eps = - mean log e+ / (e+ + sum_k e_k),    e+ = exp((z.z+ - eps) / tau),    e_k = exp((z.z_k + eps) / tau)
"""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from typing_extensions import override

from icl_msr.core.distributed import gather
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import full_precision, log_odds, own_rows, unit
from icl_msr.methods.base import Output, Pair, Step
from icl_msr.regularizers.base import Regularizer


class ImplicitFeatureModification(Regularizer):
    """Adds lam L_eps to the loss of any method.

    The negatives are the method's bank, or else the other images in the batch, on all ranks, with the keys of all pairs
    (ours for methods without negatives). The authors divide the sum of both losses by 1 + lam, which Adam does not
    feel. Non-semantic negatives are not moved.

    Args:
        method_temperature: temperature of the method, if it has one.
        epsilon: distance by which the similarities are moved.
        lam: weight of L_eps.
        temperature: tau. None takes the method's, else 0.5.
    """

    def __init__(
        self,
        method_temperature: float | None,
        *,
        epsilon: NonNegativeFloat,
        lam: NonNegativeFloat,
        temperature: PositiveFloat | None,
    ):
        super().__init__()
        self.epsilon, self.lam = epsilon, lam
        self.temperature = temperature or method_temperature or 0.5

    @override
    def forward(self, views: Views, output: Output, step: Step) -> Tensor:
        losses = [modified(pair, output.pairs, self.temperature, self.epsilon) for pair in output.pairs]
        loss = torch.stack(losses).mean()
        output.log["loss/ifm"] = loss.detach()
        return self.lam * loss


def modified(pair: Pair, pairs: Sequence[Pair], temperature: float, epsilon: float) -> Tensor:
    """Return L_eps () of one direction of comparison: InfoNCE with its similarities moved by epsilon."""
    return _modified(pair.anchor, pair, pairs, temperature, epsilon)


@full_precision
def _modified(anchor: Tensor, pair: Pair, pairs: Sequence[Pair], temperature: float, epsilon: float) -> Tensor:
    left_out = None
    if pair.bank is not None:
        bank = unit(pair.bank)
    else:
        bank = torch.cat([gather(unit(other.key)) for other in pairs])
        images = len(bank) // len(pairs)
        left_out = own_rows(len(anchor), anchor.device) + torch.arange(len(pairs), device=anchor.device) * images
    for_it, against = log_odds(unit(anchor), unit(pair.key), bank, temperature, None, left_out)
    return torch.nn.functional.softplus(against - for_it + 2 * epsilon / temperature).mean()
