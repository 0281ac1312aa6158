"""Non-semantic negatives against the text of Ge et al. 2021 and their code's logits."""

import torch
from support import naive
from support.naive import Close
from support.toys import make_method, make_views

from icl_msr.methods import Step


def test_moco(close: Close) -> None:
    method, views = make_method("moco"), make_views(negatives=2)
    targets = method.targets(views)
    output = method(views, targets, Step(0, 1))
    (query,), (key,), negatives = output.embeddings, targets.embeddings, targets.negatives
    assert negatives is not None
    assert method.queue is not None
    rows = zip(query, key, negatives.rows, strict=True)
    each = [naive.moco(q, k, list(method.queue.keys), list(t), 2.0, method.temperature or 0) for q, k, t in rows]
    close("Ge's loss, MoCo", output.loss, torch.stack(each).mean(), 1e-12)


def test_byol(close: Close) -> None:
    method, views = make_method("byol"), make_views(negatives=1)
    targets = method.targets(views)
    output = method(views, targets, Step(0, 1))
    assert targets.negatives is not None
    each = [
        naive.byol(p, k, list(t), 0.25)
        for j in (0, 1)
        for p, k, t in zip(output.embeddings[j], targets.embeddings[1 - j], targets.negatives.rows, strict=True)
    ]
    close("Ge's repulsion, BYOL", output.loss, torch.stack(each).mean(), 1e-12)
