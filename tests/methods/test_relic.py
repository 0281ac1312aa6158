"""What is special to ReLIC: the invariance penalty beside the discrimination, and the target network."""

import pytest
import torch
import torch.nn.functional as F
from support.toys import SMALL, make_method, make_views

from icl_msr.losses.contrastive import unit
from icl_msr.methods import ReLIC, Step
from icl_msr.models.momentum import rising_momentum


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_loss_follows_the_formula(alpha: float) -> None:
    method, views = make_method("relic", alpha=alpha, temperature=0.3), make_views()
    targets = method.targets(views)
    output = method(views, targets, Step(0, 10))
    (z1, z2), (k1, k2) = output.embeddings, targets.embeddings
    p, q = ((unit(z) @ unit(k).T / 0.3).log_softmax(1) for z, k in ((z1, k2), (z2, k1)))
    discrimination = -(p.diagonal().mean() + q.diagonal().mean()) / 2
    kl = sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))) / 2
    torch.testing.assert_close(output.loss, discrimination + alpha * kl)


def test_the_target_network_follows_ever_more_slowly() -> None:
    method = make_method("relic")
    assert isinstance(method, ReLIC)
    with torch.no_grad():
        for parameter in method.projector.parameters():
            parameter.add_(1)
    before = [p.clone() for p in method.momentum_encoder.projector.parameters()]
    method.advance(Step(5, 10))
    for after, old in zip(method.momentum_encoder.projector.parameters(), before, strict=True):
        torch.testing.assert_close(after, old + 1 - rising_momentum(SMALL["momentum"], 0.5))
