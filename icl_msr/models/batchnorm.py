"""BatchNorm over the batch of all ranks.

Torch's SyncBatchNorm refuses CPU tensors and has neither a forward mode nor a second derivative, and the tangent of
torch's BatchNorm has a wrong gradient (torch 2.15: its batch statistics count as constants); the bi-level step needs
all of them. This one is made of differentiable operations and one `gather` a layer.
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
    """Drop-in for BatchNorm1d, 2d and 3d: (N, C) or (N, C, ...) on each rank, N may differ between ranks.

    In training mode all ranks must call it together; in evaluation mode nothing is exchanged. Statistics are in fp32 at
    least; the output has the input's dtype.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, C) or (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the mean and the biased variance of the global batch."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        batch = input.float() if input.dtype.itemsize < 4 else input
        shape = [1, -1] + [1] * (batch.ndim - 2)
        rows = [d for d in range(batch.ndim) if d != 1]
        count = batch.numel() // batch.shape[1]
        if count * world_size() == 1:
            raise ValueError("BatchNorm needs more than one value per channel in training")

        # Sums, not means, over the batch: a mean's backward pass writes out a gradient as large as the batch.
        mean = batch.sum(rows) / count  # (C,)
        centred = batch - mean.view(shape)
        variance = (centred * centred).sum(rows) / count
        # Means and variances of the ranks pool without cancellation, unlike sums of squares.
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
        """Let running statistics follow, with the unbiased variance, as torch's do."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def global_batch_norm(module: Kind) -> Kind:
    """Turn every BatchNorm inside `module` into a `GlobalBatchNorm`, in place: same parameters, buffers and names.

    Raises:
        UserError: a layer is a BatchNorm of a kind of its own, whose extra work would be lost.
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
    """Let BatchNorm layers inside `module` normalise as they do, and leave their running statistics alone."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
