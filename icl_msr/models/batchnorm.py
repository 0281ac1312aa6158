"""BatchNorm over the batch of all ranks.

The bi-level step needs a forward mode, second derivatives, and a correct gradient of the tangent, on CPUs too. Torch's
SyncBatchNorm refuses CPU tensors and has neither a forward mode nor a second derivative. The tangent of torch's
BatchNorm has a wrong gradient (torch 2.15: its batch statistics count as constants). This BatchNorm consists of
differentiable operations and one `gather` per layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from icl_msr.core.distributed import gather, world_size
from icl_msr.core.errors import UserError

Kind = TypeVar("Kind", bound=nn.Module)


class GlobalBatchNorm(_BatchNorm):
    """A drop-in replacement of BatchNorm1d, 2d and 3d for inputs (N, C) or (N, C, ...). N may differ between ranks.

    In training mode all ranks must call it together. In evaluation mode nothing is exchanged. Statistics are at least
    in fp32; the output has the input's dtype.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C) or (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the input (N, C, ...) with the mean and the biased variance of the global batch."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        batch = input.float() if input.dtype.itemsize < 4 else input
        shape = [1, -1] + [1] * (batch.ndim - 2)
        rows = [d for d in range(batch.ndim) if d != 1]
        count = batch.numel() // batch.shape[1]
        if count * world_size() == 1:
            raise ValueError("BatchNorm needs more than one value per channel in training")

        # Sums instead of means: the backward pass of a mean writes out a gradient as large as the batch.
        mean = batch.sum(rows) / count  # (C,)
        centred = batch - mean.view(shape)
        variance = (centred * centred).sum(rows) / count
        # Means and variances of ranks can be pooled without cancellation, unlike sums of squares.
        ranks = gather(torch.stack([torch.full_like(mean, count), mean, variance])[None])  # (W, 3, C)
        counts, means, variances = ranks.unbind(1)
        total = counts.detach().sum(0)
        share = counts.detach() / total
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        if self.track_running_stats:
            self._track(mean, variance * total / (total - 1))

        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift.view(shape), batch, scale.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics with the mean and the unbiased variance, as torch does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def global_batch_norm(module: Kind) -> Kind:
    """Turn every BatchNorm inside `module` into a `GlobalBatchNorm`, in place. Parameters, buffers and names stay.

    Raises:
        UserError: a layer is a custom subclass of BatchNorm, whose extra work would be lost.
    """
    for name, layer in module.named_modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
            layer.__class__ = GlobalBatchNorm
        elif isinstance(layer, _BatchNorm) and not isinstance(layer, GlobalBatchNorm):
            raise UserError(
                f"layer {name} is a {type(layer).__name__}, whose statistics cannot be shared over ranks; "
                "train on one device, or choose a backbone with torch's BatchNorm or with another normalisation."
            )
    return module


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm layers inside `module` unchanged. The layers normalise as usual."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
