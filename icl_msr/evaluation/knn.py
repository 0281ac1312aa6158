"""k nearest neighbours with named presets, because "kNN accuracy" without its settings is not a measure.

Results do not depend on the chunk size or the device. Distances are computed in float64 and compared after rounding to
2^-36 of their range. Among equally distant bank images, the earlier one is nearer. Among classes with equal scores, the
one with the smallest number wins (as in scikit-learn).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

PresetName = Literal["wmse", "icl", "instdisc", "dino"]


@dataclass(frozen=True)
class Preset:
    """A way of voting: `k` neighbours, on unit-length features or not, by majority or weighted."""

    k: int
    normalised: bool
    """Features are scaled to unit length first."""
    temperature: float | None
    """T of the weights exp(cosine / T); None for equal votes."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "wmse": Preset(k=5, normalised=False, temperature=None),  # the code of W-MSE (Ermolov et al. 2021)
        "icl": Preset(k=5, normalised=True, temperature=None),  # the words of ICL-MSR, section 6.2
        "instdisc": Preset(k=200, normalised=True, temperature=0.1),  # Wu et al. 2018
        "dino": Preset(k=20, normalised=True, temperature=0.07),  # Caron et al. 2021
    }
)

_SPARE, _BLOCK = 16, 16
"""Number of candidates beyond k, and of bank images in a block; see `_candidates`."""


def neighbours(
    bank: Tensor, queries: Tensor, k: int, *, normalised: bool, chunk_bytes: int = 2**27
) -> tuple[Tensor, Tensor]:
    """Return Euclidean distances float64 (N, k) and positions int64 (N, k) of the k bank images nearest to each query.

    Neighbours are sorted, the nearest first. `bank` (M, c) and `queries` (N, c) are on one device; `k` is clipped to M.
    The (chunk, M) distances take about `chunk_bytes` bytes at a time.

    On the CPU, products in float32 find candidates, and their distances are computed again in float64. Queries for
    which the rounding errors of float32 could hide a neighbour are compared with the whole bank in float64.
    """
    bank, queries = (features.to(torch.float64, copy=True) for features in (bank, queries))
    if normalised:
        bank.div_(_norms(bank).clamp_min(1e-12)[:, None])
        queries.div_(_norms(queries).clamp_min(1e-12)[:, None])
    centre = bank[:: max(1, len(bank) // 1000)].mean(0)  # distances stay as they are, and rounding errors shrink
    bank.sub_(centre)
    queries.sub_(centre)
    rows = max(1, chunk_bytes // (4 * len(bank)))
    search = _Search(bank, min(k, len(bank)), min(rows, len(queries)))
    found = [search(chunk) for chunk in torch.split(queries, rows)]
    return torch.cat([distances for distances, _ in found]), torch.cat([positions for _, positions in found])


class _Search:
    """The k images of a bank float64 (M, c) that are nearest to each of at most `rows` queries."""

    def __init__(self, bank: Tensor, k: int, rows: int):
        self.bank, self.k, self.norms = bank, k, _norms(bank).square()
        self.rounds = bank.device.type == "cpu"
        if self.rounds:  # rows whose products with (-2 query, 1) are distances, up to a multiple of a block
            self.coarse = bank.new_zeros(-(-len(bank) // _BLOCK) * _BLOCK, bank.shape[1] + 1, dtype=torch.float32)
            self.coarse[: len(bank), :-1] = bank
            self.coarse[: len(bank), -1] = self.norms
            self.coarse[len(bank) :, -1] = torch.inf
            self.room = self.coarse.new_empty(rows, len(self.coarse))

    def __call__(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return sorted distances float64 and positions int64, both (N, k)."""
        size = len(self.bank)
        norms = _norms(queries).square()[:, None]
        largest = (norms.sqrt() + self.norms.max().sqrt()).square().clamp_min(torch.finfo(torch.float64).tiny)
        scale = 2.0 ** min(36, 62 - size.bit_length()) / largest
        if self.rounds:
            nearest, sure = self._refined(queries, norms, largest, scale)
        else:
            nearest, sure = norms.new_empty(len(queries), self.k, dtype=torch.int64), norms[:, 0] < 0
        rest = ~sure
        if rest.any():
            squared = torch.addmm(self.norms, queries[rest], self.bank.T, alpha=-2).add_(norms[rest])
            code = _code(squared, torch.arange(size, device=self.bank.device), scale[rest], size)
            nearest[rest] = code.topk(self.k, largest=False).values
        return (nearest // size / scale).sqrt(), nearest % size

    def _refined(self, queries: Tensor, norms: Tensor, largest: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (N, k) of the nearest of the candidates, and whether no other image can be as near (N,)."""
        size, channels = self.bank.shape
        count = min(self.k + _SPARE, size)
        everyone = torch.mm(pad(-2 * queries.float(), (0, 1), value=1.0), self.coarse.T, out=self.room[: len(queries)])
        rough, positions = _candidates(everyone, count)
        positions.clamp_(max=size - 1)
        squared = self.norms[positions] - 2 * _products(queries, self.bank, positions)
        # The largest error of sums in float32, in any order. Where a setting lowers the precision, it is exceeded.
        error = 2.0**-24 * (channels + 4) * largest[:, 0]
        sure = (squared - rough).abs().amax(1) <= error
        nearest = _code(squared.add_(norms), positions, scale, size).sort().values[:, : self.k]
        if count < size:
            others = ((rough.amax(1) - error + norms[:, 0]) * scale[:, 0]).round()  # no other image is nearer
            sure &= others > nearest[:, -1] // size
        return nearest, sure


def _norms(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=1)
    return norms


def _candidates(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest values of each row (N, M), in any order, and their positions. Blocks divide M.

    The values lie in the k blocks with the smallest minima, so two small parts of a row are sorted.
    """
    blocks = values.shape[1] // _BLOCK
    if blocks < 4 * k:
        few = values.topk(k, largest=False, sorted=False)
        return few.values, few.indices
    minima = values.view(-1, _BLOCK, blocks).amin(1)
    chosen = minima.topk(k, largest=False, sorted=False).indices
    positions = (chosen[:, None] + blocks * torch.arange(_BLOCK)[:, None]).flatten(1)
    smallest = values.gather(1, positions).topk(k, largest=False, sorted=False)
    return smallest.values, positions.gather(1, smallest.indices)


def _products(queries: Tensor, bank: Tensor, positions: Tensor) -> Tensor:
    """Return the products (N, k) of queries (N, c) and the bank images (M, c) at `positions` (N, k)."""
    rows, k = positions.shape
    begins = torch.arange(0, rows * k + 1, k)
    with warnings.catch_warnings(action="ignore"):  # sparse tensors are in beta
        pattern = torch.sparse_csr_tensor(begins, positions.flatten(), bank.new_zeros(rows * k), (rows, len(bank)))
    products: Tensor = torch.sparse.sampled_addmm(pattern, queries, bank.T, beta=0.0).values().view(rows, k)
    return products


def _code(squared: Tensor, positions: Tensor, scale: Tensor, size: int) -> Tensor:
    """Return an integer for the rounded distance and the position among `size`, so that no two candidates are equal."""
    return squared.clamp_(min=0).mul_(scale).round_().long().mul_(size).add_(positions)


def vote(distances: Tensor, labels: Tensor, preset: Preset, classes: int) -> Tensor:
    """Return class scores float32 (N, classes) from neighbours' `distances` and `labels`, both (N, >= k), sorted."""
    distances, labels = distances[:, : preset.k], labels[:, : preset.k]
    if preset.temperature is None:
        return one_hot(labels, classes).sum(1).float()
    # On the unit sphere cosine - 1 = -distance^2 / 2. The constant does not change the order of the scores.
    weights = torch.exp(distances.square() / (-2 * preset.temperature))
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights).float()


def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, presets: Sequence[PresetName], classes: int
) -> dict[PresetName, Tensor]:
    """Return class scores float32 (N, classes) for each preset.

    `bank` (M, c) has `bank_labels` (M,) int64; `queries` is (N, c). Presets with the same distance share a search.
    """
    scores: dict[PresetName, Tensor] = {}
    for normalised in (False, True):
        chosen = {name: PRESETS[name] for name in presets if PRESETS[name].normalised == normalised}
        if chosen:
            k = max(preset.k for preset in chosen.values())
            distances, positions = neighbours(bank, queries, k, normalised=normalised)
            for name, preset in chosen.items():
                scores[name] = vote(distances, bank_labels[positions], preset, classes)
    return {name: scores[name] for name in presets}


def knn_predict(bank: Tensor, bank_labels: Tensor, queries: Tensor, preset: PresetName, classes: int) -> Tensor:
    """Return predicted classes int64 (N,) of `queries` (N, c) for one preset; see `knn_scores`."""
    return knn_scores(bank, bank_labels, queries, [preset], classes)[preset].argmax(1)
