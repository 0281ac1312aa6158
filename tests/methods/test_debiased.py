"""What is special to debiased contrastive learning: without false negatives it is SimCLR."""

import torch
from support.toys import make_method, make_views

from icl_msr.methods import Step


def test_without_false_negatives_it_is_simclr() -> None:
    views, losses = make_views(negatives=1), {}
    for name, keys in (("simclr", {}), ("debiased", {"tau_plus": 0.0})):
        method = make_method(name, temperature=0.3, **keys)
        losses[name] = method(views, method.targets(views), Step(0, 10)).loss
    torch.testing.assert_close(losses["debiased"], losses["simclr"])


def test_debiasing_lowers_the_loss() -> None:
    views, losses = make_views(), []
    for tau_plus in (0.0, 0.05, 0.1):
        method = make_method("debiased", tau_plus=tau_plus, temperature=1.0)
        losses.append(float(method(views, method.targets(views), Step(0, 10)).loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
