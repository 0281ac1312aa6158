"""Projectors and predictors: the small heads on top of a backbone."""

import itertools

from torch import nn

from icl_msr.models.batchnorm import GlobalBatchNorm


def mlp(
    *widths: int, norm: bool = True, norm_last: bool = False, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Build a head of linear layers widths[0] -> ... -> widths[-1], with BatchNorm and an activation between them.

    The BatchNorm is `GlobalBatchNorm`. Its forward mode can be differentiated. In torch's own, the batch statistics
    silently count as constants.

    Args:
        widths: width of the input, of the hidden layers and of the output.
        norm: put BatchNorm before every activation. The linear layer then has no bias.
        norm_last: end with BatchNorm.
        activation: the class of the activations.
    """
    layers: list[nn.Module] = []
    for depth, (width, wider) in enumerate(itertools.pairwise(widths), start=2):
        last = depth == len(widths)
        normalised = norm_last if last else norm
        layers.append(nn.Linear(width, wider, bias=not normalised))
        if normalised:
            layers.append(GlobalBatchNorm(wider))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)
