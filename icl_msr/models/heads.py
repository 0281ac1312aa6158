"""Projectors and predictors: the small heads on top of a backbone."""

import itertools

from torch import nn

from icl_msr.models.batchnorm import GlobalBatchNorm


def mlp(
    *widths: int, norm: bool = True, norm_last: bool = False, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """A head of linear layers widths[0] -> ... -> widths[-1], with BatchNorm and an activation between them.

    `norm` puts BatchNorm before every activation (the linear layer then has no bias); `norm_last` ends with one. It is
    the one whose forward mode can be differentiated: torch's silently takes the batch statistics for constants.
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
