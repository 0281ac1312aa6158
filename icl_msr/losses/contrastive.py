"""InfoNCE and its relatives. N images, D embedding, K bank, M = N x ranks, m non-semantic negatives an image.

Embeddings need not be normalised; the functions normalise them and compute in (at least) fp32. Non-semantic negatives
follow Ge et al. 2021 (NeurIPS), section 3: they are compared with their own image only, and alpha multiplies their
similarity inside the exponent.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from icl_msr.distributed import gather, rank
from icl_msr.views import NonSemantic

Arguments = ParamSpec("Arguments")

CHUNK = 2**20
"""Similarities that lie in memory at a time."""


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


def own_rows(n: int, device: torch.device) -> Tensor:
    """Where this rank's n images stand among the gathered ones: (n, 1) int64."""
    return torch.arange(n, device=device)[:, None] + rank() * n


class _LogSumExp(Function):
    """Keeps no similarity for the backward pass, which computes them again, a chunk of anchors at a time.

    First derivatives only: what is differentiated twice, such as a regularizer, uses torch's own.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, bank: Tensor, left_out: Tensor, temperature: float) -> Tensor:
        chunk = max(1, CHUNK // len(bank))
        parts = zip(anchors.split(chunk), left_out.split(chunk), strict=True)
        sums = torch.cat([torch.logsumexp(_logits(a, bank, out, temperature), dim=1) for a, out in parts])
        ctx.save_for_backward(anchors, bank, left_out, sums)
        ctx.temperature, ctx.chunk = temperature, chunk
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        anchors, bank, left_out, sums = ctx.saved_tensors
        to_anchors = torch.empty_like(anchors)
        to_bank = torch.zeros_like(bank) if ctx.needs_input_grad[1] else None
        parts = (t.split(ctx.chunk) for t in (anchors, left_out, sums, gradient / ctx.temperature, to_anchors))
        for a, out, total, weight, to_a in zip(*parts, strict=True):
            shares = _logits(a, bank, out, ctx.temperature).sub_(total[:, None]).exp_().mul_(weight[:, None])
            torch.mm(shares, bank, out=to_a)
            if to_bank is not None:
                to_bank.addmm_(shares.T, a)
        return to_anchors, to_bank, None, None


def _logits(anchors: Tensor, bank: Tensor, left_out: Tensor, temperature: float) -> Tensor:
    return (anchors @ bank.T).div_(temperature).scatter_(1, left_out, float("-inf"))


def log_sum_exp(anchors: Tensor, bank: Tensor, temperature: float, left_out: Tensor | None = None) -> Tensor:
    """log sum_k exp(a.b_k / tau) for each anchor, (N,), without an (N, K) matrix in memory.

    Args:
        anchors, bank: (N, D) and (K, D), of unit length.
        temperature: tau > 0.
        left_out: (N, e) int64, columns of the bank that do not count for an anchor.
    """
    if left_out is None:
        left_out = torch.empty(len(anchors), 0, dtype=torch.long, device=anchors.device)
    return _LogSumExp.apply(anchors, bank, left_out, temperature)  # type: ignore[no-any-return]


def log_odds(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    temperature: float,
    negatives: NonSemantic | None,
    left_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logarithms, (N,) each, of what speaks for the positive and of the sum of what speaks against it.

    Every loss of this file is a function of the two: that of InfoNCE is log(1 + against / for).

    Args:
        anchors, positives: (N, D), of unit length, and so are the rows of the bank.
        bank, temperature, left_out: see `log_sum_exp`.
        negatives: m further negatives for each anchor.
    """
    for_it = (anchors * positives).sum(1) / temperature
    against = log_sum_exp(anchors, bank, temperature, left_out)
    if negatives is not None:
        cosines = torch.einsum("nd,nmd->nm", anchors, unit(negatives.rows))
        against = torch.logaddexp(against, torch.logsumexp(negatives.alpha * cosines / temperature, dim=1))
    return for_it, against


def two_view_log_odds(
    first: Tensor, second: Tensor, temperature: float, negatives: NonSemantic | None
) -> tuple[Tensor, Tensor]:
    """`log_odds` of both views' anchors, (2N,): the negatives are the 2M - 2 views of the other images."""
    n = len(first)
    first, second = unit(first), unit(second)
    everyone = torch.cat([gather(first), gather(second)])  # (2M, D)
    own = own_rows(n, first.device)
    own = torch.cat([own, own + len(everyone) // 2], dim=1).repeat(2, 1)
    twice = None if negatives is None else NonSemantic(negatives.rows.repeat(2, 1, 1), negatives.alpha, 0.0)
    anchors, positives = torch.cat([first, second]), torch.cat([second, first])
    return log_odds(anchors, positives, everyone, temperature, twice, own)


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
    for_it, against = two_view_log_odds(first, second, temperature, negatives)
    return (torch.logaddexp(for_it, against) - for_it).mean()


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
    for_it, against = log_odds(unit(anchors), unit(positives), unit(bank), temperature, negatives)
    return (torch.logaddexp(for_it, against) - for_it).mean()


@full_precision
def in_batch_nce(anchors: Tensor, keys: Tensor, temperature: float, negatives: NonSemantic | None = None) -> Tensor:
    """InfoNCE whose negatives are the other images' keys, on all ranks (MoCo v3; Chen, Xie and He 2021, eq. 1).

    Args:
        anchors, keys: (N, D); an anchor's positive is the key in its row.
        temperature: tau > 0.
        negatives: m further logits for each anchor.

    Returns:
        () mean over the anchors.
    """
    keys = unit(keys)
    own = own_rows(len(keys), keys.device)
    for_it, against = log_odds(unit(anchors), keys, gather(keys), temperature, negatives, own)
    return (torch.logaddexp(for_it, against) - for_it).mean()
