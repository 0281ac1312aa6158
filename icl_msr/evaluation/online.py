"""What the training loop watches: kNN on a held-out part of the train split. No test image is touched."""

from collections.abc import Sequence

import torch
from torch import nn

from icl_msr.data.dataset import Split
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import PresetName, knn_predict
from icl_msr.evaluation.linear import hold_out


def online_knn(
    encoder: nn.Module,
    train: Split,
    *,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int,
    bank_size: int,
    query_size: int,
    seed: int,
    preset: PresetName = "dino",
) -> float:
    """Accuracy in [0, 1] on `query_size` held-out images of `train`, with a bank of `bank_size` others.

    The held-out images depend on `seed` and the size of `train` alone, not on the epoch. Both sizes are clipped to
    what there is. The encoder is left as it was found (see `extract`).
    """
    fit, held = hold_out(len(train), min(query_size / len(train), 0.5), seed)
    bank = fit[torch.linspace(0, len(fit) - 1, min(bank_size, len(fit))).long()]
    index = torch.cat([bank, held])
    features = extract(
        encoder,
        train,
        mean=mean,
        std=std,
        device=device,
        batch_size=batch_size,
        label="online kNN",
        index=index,
    ).to(device)
    labels = train.labels.to(device)[index.to(device)]
    count = len(bank)
    predicted = knn_predict(features[:count], labels[:count], features[count:], preset, classes)
    return (predicted == labels[count:]).float().mean().item()
