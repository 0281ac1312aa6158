"""InfoNCE and its relatives. N images, D embedding, K bank, M = N x ranks, m non-semantic negatives per image, tau > 0.

Embeddings need not be normalised: the functions normalise them and compute in (at least) fp32. Non-semantic negatives
follow Ge et al. 2021 (NeurIPS), section 3. They are compared with their own image only. alpha multiplies either their
similarity inside the exponent, as in the authors' code, or their exponential (`NonSemantic.alpha_mode`). Means are over
the local anchors.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from icl_msr.core.distributed import gather, rank, world_size
from icl_msr.core.views import NonSemantic

Arguments = ParamSpec("Arguments")

CHUNK = 2**21
"""Number of similarities that are held in memory at a time."""


class HardSum(Protocol):
    """A sum over each anchor's negatives that makes them harder; see `icl_msr.losses.hard_negatives`."""

    def __call__(
        self, anchors: Tensor, bank: Tensor, temperature: float, numbers: Tensor, left_out: Tensor | None
    ) -> Tensor:
        """Return the logarithm of the sum over the negatives of each anchor, (A,), in the place of `log_sum_exp`.

        Args:
            anchors, bank: (A, D) and (K, D), of unit length.
            temperature: tau > 0.
            numbers: (A,) int64, the number of each anchor in the global batch.
            left_out: (A, e) int64, columns of the bank that are no negatives of an anchor; None: all are.
        """
        ...


def full_precision(loss: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """Return the loss with autocast switched off inside.

    A similarity in bf16 has two significant digits, too few for a low temperature.
    """

    @wraps(loss)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*args, **kwargs)

    return wrapped


def unit(embeddings: Tensor) -> Tensor:
    """Return rows of unit length, at least in fp32: (..., D) to (..., D)."""
    return F.normalize(embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings, dim=-1)


def own_rows(n: int, device: torch.device) -> Tensor:
    """Return the positions of this rank's n images among the gathered ones: (n, 1) int64."""
    return torch.arange(n, device=device)[:, None] + rank() * n


class _LogSumExp(Function):
    """log sum_k exp(a.b_k) without stored logits. The backward pass computes them again, a chunk of anchors at a time.

    It has a first derivative only. Code that is differentiated twice, such as a regularizer, uses `torch.logsumexp`.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, bank: Tensor, left_out: Tensor) -> Tensor:
        ctx.chunk = max(1, CHUNK // max(1, len(bank)))
        sums = torch.empty_like(anchors[:, 0])
        for a, out, total in zip(*(torch.split(t, ctx.chunk) for t in (anchors, left_out, sums)), strict=True):
            torch.logsumexp((a @ bank.T).scatter_(1, out, float("-inf")), dim=1, out=total)
        ctx.save_for_backward(anchors, bank, left_out, sums)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("log_sum_exp has no second derivative; use torch.logsumexp where one is needed")
        anchors, bank, left_out, sums = ctx.saved_tensors
        gradient = gradient[:, None]
        to_anchors, weighted = torch.empty_like(anchors), anchors * gradient
        to_bank = torch.zeros_like(bank) if ctx.needs_input_grad[1] else None
        parts = (torch.split(t, ctx.chunk) for t in (anchors, left_out, -sums[:, None], weighted, to_anchors))
        for a, out, minus_total, w, to_a in zip(*parts, strict=True):
            shares = torch.addmm(minus_total, a, bank.T).scatter_(1, out, float("-inf")).exp_()
            torch.mm(shares, bank, out=to_a)
            if to_bank is not None:
                to_bank.addmm_(shares.T, w)
        return to_anchors.mul_(gradient), to_bank, None


def log_sum_exp(anchors: Tensor, bank: Tensor, temperature: float, left_out: Tensor | None = None) -> Tensor:
    """Return log sum_k exp(a.b_k / tau) of each anchor, (N,), without an (N, K) matrix in memory.

    Args:
        anchors, bank: (N, D) and (K, D), of unit length.
        temperature: tau > 0.
        left_out: (N, e) int64, columns of the bank that do not count for an anchor.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`; there is no second derivative.
    """
    if left_out is None:
        left_out = torch.empty(len(anchors), 0, dtype=torch.long, device=anchors.device)
    return _LogSumExp.apply(anchors / temperature, bank, left_out)  # type: ignore[no-any-return]


def log_odds(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    temperature: float,
    negatives: NonSemantic | None,
    left_out: Tensor | None = None,
    hard: HardSum | None = None,
    views: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the positive's exponential and of the sum of the negatives' exponentials, (N,) each.

    Every loss in this file is a function of the two. InfoNCE, for example, is log(1 + negatives / positive).

    Args:
        anchors, positives: (N, D), of unit length, as are the rows of the bank.
        bank, temperature, left_out: see `log_sum_exp`.
        negatives: m further negatives for each anchor.
        hard: the sum over the bank; None: `log_sum_exp`.
        views: V, if the anchors are V views of N / V images, one view after the other.
    """
    for_it = (anchors * positives).sum(1) / temperature
    if hard is None:
        against = log_sum_exp(anchors, bank, temperature, left_out)
    else:
        images = len(anchors) // views
        own = own_rows(images, anchors.device)[:, 0]
        numbers = torch.cat([own + view * images * world_size() for view in range(views)])
        against = hard(anchors, bank, temperature, numbers, left_out)
    return for_it, with_non_semantic(against, anchors, temperature, negatives)


def with_non_semantic(against: Tensor, anchors: Tensor, temperature: float, negatives: NonSemantic | None) -> Tensor:
    """Add the exponentials of each image's own m negatives to `against`.

    Args:
        against: (V N,) logarithms of sums of exponentials, for V views one after the other.
        anchors: (V N, D), of unit length.
        temperature: tau > 0.
        negatives: m negatives for each of the N images.

    Returns:
        (V N,) logarithms.
    """
    if negatives is None:
        return against
    weight, factor = (negatives.alpha, 1.0) if negatives.alpha_mode == "weight" else (1.0, negatives.alpha)
    if weight == 0:
        return against
    rows = unit(negatives.rows)
    views = anchors.reshape(-1, len(rows), rows.shape[-1])
    cosines = torch.einsum("vnd,nmd->vnm", views, rows).flatten(0, 1)
    return torch.logaddexp(against, torch.logsumexp(factor * cosines / temperature, dim=1) + math.log(weight))


def two_view_log_odds(
    first: Tensor, second: Tensor, temperature: float, negatives: NonSemantic | None, hard: HardSum | None = None
) -> tuple[Tensor, Tensor]:
    """Return `log_odds` of the anchors of both views, (2N,). The negatives are the 2M - 2 views of the other images."""
    n = len(first)
    first, second = unit(first), unit(second)
    everyone = torch.cat([gather(first), gather(second)])  # (2M, D)
    own = own_rows(n, first.device)
    own = torch.cat([own, own + len(everyone) // 2], dim=1).repeat(2, 1)
    anchors, positives = torch.cat([first, second]), torch.cat([second, first])
    return log_odds(anchors, positives, everyone, temperature, negatives, own, hard, views=2)


@full_precision
def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float,
    negatives: NonSemantic | None = None,
    hard: HardSum | None = None,
) -> Tensor:
    """Return NT-Xent of SimCLR: each view against the 2M - 1 other views of the global batch (Chen et al. 2020, eq. 1).

    Args:
        first, second: (N, D) embeddings of the two views.
        temperature: tau > 0.
        negatives: m further logits for each of the two anchors of an image.
        hard: the sum over the negatives; None: the ordinary one.

    Returns:
        () mean over the 2N local anchors.
    """
    for_it, against = two_view_log_odds(first, second, temperature, negatives, hard)
    return (torch.logaddexp(for_it, against) - for_it).mean()


@full_precision
def supervised_contrastive(
    views: Sequence[Tensor], labels: Tensor, classes: int, temperature: float, negatives: NonSemantic | None = None
) -> Tensor:
    """Return the supervised contrastive loss, with the mean outside the logarithm (L_out; Khosla et al. 2020, eq. 2).

    The positives of an anchor are all other views of its class in the global batch. All other views are in its
    denominator. An image without a label is a class of its own (ours), so that without labels the loss is NT-Xent.

    Args:
        views: V times (N, D), the embeddings of each view.
        labels: (N,) int64, below `classes`; -1: unlabelled.
        classes: number of classes.
        temperature: tau > 0.
        negatives: m further logits for each of the V anchors of an image.

    Returns:
        () mean over the V N local anchors.
    """
    n, rows = len(labels), [unit(view) for view in views]
    own, labels, anchors = own_rows(n, labels.device), gather(labels), torch.cat(rows)
    everyone = torch.cat([gather(view) for view in rows])  # (V M, D)
    images = len(labels)
    group = torch.where(labels < 0, classes + torch.arange(images, device=labels.device), labels)
    mine, theirs = group[own[:, 0]].repeat(len(rows)), group.repeat(len(rows))
    sums = everyone.new_zeros(classes + images, everyone.shape[1]).index_add(0, theirs, everyone)
    counts = sums.new_zeros(len(sums)).index_add(0, theirs, sums.new_ones(len(theirs)))  # bincount waits for the device
    others = counts[mine] - 1
    for_it = ((sums[mine] - anchors) * anchors).sum(1) / others / temperature
    own = torch.cat([own + view * images for view in range(len(rows))])
    everything = log_sum_exp(anchors, everyone, temperature, own)
    return (with_non_semantic(everything, anchors, temperature, negatives) - for_it).mean()


@full_precision
def info_nce(
    anchors: Tensor,
    positives: Tensor,
    bank: Tensor,
    temperature: float,
    negatives: NonSemantic | None = None,
    hard: HardSum | None = None,
) -> Tensor:
    """Return InfoNCE against a bank of negatives (MoCo; He et al. 2020, eq. 1; Ge et al. 2021, eq. 3).

    Args:
        anchors, positives: (N, D) queries and their keys.
        bank: (K, D) negatives shared by all anchors.
        temperature: tau > 0.
        negatives: m further logits for each anchor.
        hard: the sum over the negatives; None: the ordinary one.

    Returns:
        () mean over the anchors of -log softmax([q.k+, q.bank, alpha q.t] / tau) at q.k+.
    """
    for_it, against = log_odds(unit(anchors), unit(positives), unit(bank), temperature, negatives, hard=hard)
    return (torch.logaddexp(for_it, against) - for_it).mean()


@full_precision
def in_batch_nce(
    anchors: Tensor,
    keys: Tensor,
    temperature: float,
    negatives: NonSemantic | None = None,
    hard: HardSum | None = None,
) -> Tensor:
    """Return InfoNCE against the keys of the other images on all ranks (MoCo v3; Chen, Xie and He 2021, eq. 1).

    Args:
        anchors, keys: (N, D); an anchor's positive is the key in its row.
        temperature: tau > 0.
        negatives: m further logits for each anchor.
        hard: the sum over the negatives; None: the ordinary one.

    Returns:
        () mean over the anchors.
    """
    keys = unit(keys)
    own = own_rows(len(keys), keys.device)
    for_it, against = log_odds(unit(anchors), keys, gather(keys), temperature, negatives, own, hard)
    return (torch.logaddexp(for_it, against) - for_it).mean()


@full_precision
def decoupled(
    first: Tensor,
    second: Tensor,
    temperature: float,
    sigma: float | None = None,
    negatives: NonSemantic | None = None,
    hard: HardSum | None = None,
) -> Tensor:
    """Return NT-Xent without the positive in the denominator (DCL; Yeh et al. 2021, eq. 6).

    Args:
        first, second: (N, D) embeddings of the two views.
        temperature: tau > 0.
        sigma: width of the von Mises-Fisher weights of the positives (DCLW). None: every positive has weight 1.
        negatives: m further logits for each of the two anchors of an image.
        hard: the sum over the negatives; None: the ordinary one.

    Returns:
        () mean over the 2N anchors of log sum_k exp(z.z_k / tau) - w z.z+ / tau; it may be negative.
    """
    for_it, against = two_view_log_odds(first, second, temperature, negatives, hard)
    if sigma is not None:
        for_it = von_mises_fisher_weights(first, second, sigma).repeat(2) * for_it
    return (against - for_it).mean()


def von_mises_fisher_weights(first: Tensor, second: Tensor, sigma: float) -> Tensor:
    """Return w = 2 - exp(z.z+ / sigma) / mean exp(z.z+ / sigma), (N,), without gradient (DCLW; Yeh et al. 2021).

    Positives that are still far apart get a larger weight, up to 2. The mean is over the images of all ranks.
    """
    similarity = (unit(first) * unit(second)).sum(1).detach() / sigma
    everyone = gather(similarity)
    return 2 - torch.exp(similarity - torch.logsumexp(everyone, dim=0) + math.log(len(everyone)))


@full_precision
def debiased(
    first: Tensor,
    second: Tensor,
    temperature: float,
    tau_plus: float,
    negatives: NonSemantic | None = None,
    hard: HardSum | None = None,
) -> Tensor:
    """Return NT-Xent corrected for false negatives (Chuang et al. 2020, eq. 7, 8).

    A share tau+ of the n = 2M - 2 other views is expected to show the anchor's own class. Their contribution is
    estimated from the positive and subtracted from S, the sum over the others:
    n g = max((S - tau+ n exp(z.z+ / tau)) / (1 - tau+), n exp(-1 / tau)).

    Args:
        first, second: (N, D) embeddings of the two views.
        temperature: tau > 0.
        tau_plus: tau+, 0 <= tau+ < 1. With 0 the loss is NT-Xent.
        negatives: m further logits for each of the two anchors of an image. They are never false negatives, so they are
            added to n g uncorrected (ours).
        hard: S; None: the ordinary sum. The terms of another one must have weights of mean 1 (Robinson et al. 2021).

    Returns:
        () mean over the 2N anchors of -log exp(z.z+ / tau) / (exp(z.z+ / tau) + n g).
    """
    for_it, against = two_view_log_odds(first, second, temperature, None, hard)
    n = 2 * world_size() * len(first) - 2
    least = against.new_full((), math.log(n) - 1 / temperature)
    log_share = for_it + against.new_full((), tau_plus * n).log() - against
    # If the share is 1 or more, the lower bound applies. -1 keeps the unused branch finite.
    rest = (-torch.expm1(torch.where(log_share < 0, log_share, -1))).log() - math.log1p(-tau_plus)
    against = torch.where(log_share < 0, torch.maximum(against + rest, least), least)
    against = with_non_semantic(against, torch.cat([unit(first), unit(second)]), temperature, negatives)
    return (torch.logaddexp(for_it, against) - for_it).mean()


@full_precision
def neighbour_nce(
    neighbours: Tensor,
    predictions: Tensor,
    temperature: float,
    negatives: NonSemantic | None = None,
    hard: HardSum | None = None,
) -> Tensor:
    """Return InfoNCE with a nearest neighbour in the anchor's place (NNCLR; Dwibedi et al. 2021, eq. 3).

    Args:
        neighbours: (N, D) the nearest neighbour of one view of each image, without gradient.
        predictions: (N, D) predictions of the other view, the positives. The negatives are the predictions of the other
            images, on all ranks.
        temperature: tau > 0.
        negatives: m further logits for each anchor. They are compared with the prediction (ours): a neighbour has no
            gradient, so nothing would be pushed away from them.
        hard: the sum over the negatives; None: the ordinary one.

    Returns:
        () mean over the anchors.
    """
    predictions = unit(predictions)
    own = own_rows(len(predictions), predictions.device)
    for_it, against = log_odds(unit(neighbours), predictions, gather(predictions), temperature, None, own, hard)
    against = with_non_semantic(against, predictions, temperature, negatives)
    return (torch.logaddexp(for_it, against) - for_it).mean()


@full_precision
@torch.no_grad()
def nearest(queries: Tensor, support: Tensor) -> Tensor:
    """Return the row of the support set (K, D) with the largest cosine to each query, (N, D), without gradient."""
    support = unit(support)
    parts = torch.split(unit(queries), max(1, CHUNK // len(support)))
    return support[torch.cat([(part @ support.T).argmax(1) for part in parts])]
