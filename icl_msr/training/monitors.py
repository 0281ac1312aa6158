"""Numbers logged for every method: the collapse of embeddings and the hardness of negatives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from icl_msr.core.distributed import gather
from icl_msr.losses.contrastive import CHUNK, own_rows, unit
from icl_msr.methods.base import Output, Pair

HARDEST = 100
"""One in this many of the other images counts as hardest."""


@torch.no_grad()
def collapse(output: Output) -> dict[str, Tensor]:
    """Return the std of unit embeddings x sqrt(D): 1 when they fill the sphere and 0 when they collapse."""
    embeddings = unit(gather(output.embeddings[0]))
    return {"embedding_std": embeddings.std(dim=0).mean() * embeddings.shape[1] ** 0.5}


@torch.no_grad()
def similarities(pairs: Sequence[Pair], own: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return mean cosines of anchors to what they are compared with (Ge et al. 2021). They show how hard negatives are.

    The means are taken over this rank's anchors, up to the number whose similarities fit into a chunk.

    Args:
        pairs: the pairs that the method compares.
        own: non-semantic negatives (N, m, D) of each pair's anchors; empty without such negatives.

    Returns:
        `negatives/similarity_own`: to its own non-semantic negatives; `_positive`: to its key; `_others`: to the bank,
        or to the other images' keys on all ranks; `_hardest`: to the hundredth of these that is most like it.
    """
    found: dict[str, list[Tensor]] = {}
    for pair, negatives in zip(pairs, own, strict=False):
        bank = gather(unit(pair.key)) if pair.bank is None else unit(pair.bank)
        looked_at = slice(max(1, CHUNK // len(bank)))
        anchor = unit(pair.anchor[looked_at])
        with torch.autocast(anchor.device.type, enabled=False):
            others = anchor @ bank.T
        if pair.bank is None:
            itself = own_rows(len(pair.anchor), anchor.device)[looked_at]
            kept = torch.ones_like(others, dtype=torch.bool).scatter_(1, itself, False)
            others = others[kept].view(len(anchor), -1)
        cosines = {
            "own": (anchor[:, None] * unit(negatives[looked_at])).sum(2),
            "positive": (anchor * unit(pair.key[looked_at])).sum(1),
            "others": others,
            "hardest": others.topk(-(-others.shape[1] // HARDEST), dim=1).values,
        }
        for name, values in cosines.items():
            found.setdefault(f"negatives/similarity_{name}", []).append(values.mean())
    return {name: torch.stack(means).mean() for name, means in found.items()}
