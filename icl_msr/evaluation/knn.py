"""k nearest neighbours with named presets, because "kNN accuracy" without its settings is not a measure.

Results do not depend on the chunk size or the device. Distances are computed in float64 and compared after rounding to
2^-36 of their range. Among equally distant bank images, the earlier one is nearer. Among classes with equal scores, the
one with the smallest number wins (as in scikit-learn).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

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

_SPARE = 16
"""Number of candidates beyond k; see `neighbours`."""


def neighbours(
    bank: Tensor, queries: Tensor, k: int, *, normalised: bool, chunk_bytes: int = 2**26
) -> tuple[Tensor, Tensor]:
    """Return Euclidean distances float64 (N, k) and positions int64 (N, k) of the k bank images nearest to each query.

    Neighbours are sorted, the nearest first. `bank` (M, c) and `queries` (N, c) are on one device; `k` is clipped to M.
    The (chunk, M) distances take about `chunk_bytes` bytes at a time.
    """
    size = len(bank)
    k = min(k, size)
    bank, queries = bank.double(), queries.double()
    if normalised:
        bank, queries = normalize(bank), normalize(queries)
    bank_norms = bank.square().sum(1)
    levels = 2.0 ** min(36, 62 - size.bit_length())
    distances, positions = [], []
    for chunk in torch.split(queries, max(1, chunk_bytes // (8 * size))):
        norms = chunk.square().sum(1, keepdim=True)
        largest = (norms.sqrt() + bank_norms.max().sqrt()).square().clamp_min(torch.finfo(torch.float64).tiny)
        squared = torch.addmm(bank_norms, chunk, bank.T, alpha=-2)  # without the query's norm: it changes no order
        candidates = squared.topk(min(k + _SPARE, size), largest=False)
        code = _code(*candidates, norms, levels / largest, size).sort().values
        nearest = code[:, :k]
        # Images as near as the last candidate may be missing. If the k-th is as near as that, all images are compared.
        tied = (code[:, k - 1] // size == code[:, -1] // size).nonzero()[:, 0]
        if candidates.indices.shape[1] < size and len(tied):
            everyone = torch.arange(size, device=bank.device)
            code = _code(squared[tied], everyone, norms[tied], levels / largest[tied], size)
            nearest[tied] = code.topk(k, largest=False).values
        distances.append(((nearest // size) * (largest / levels)).sqrt())
        positions.append(nearest % size)
    return torch.cat(distances), torch.cat(positions)


def _code(squared: Tensor, positions: Tensor, norms: Tensor, scale: Tensor, size: int) -> Tensor:
    """Return an integer for the rounded distance and the position among `size`, so that no two candidates are equal."""
    return (squared + norms).clamp_(min=0).mul_(scale).round_().long().mul_(size).add_(positions)


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
