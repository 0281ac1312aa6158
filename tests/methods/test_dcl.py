"""What is special to DCL: the weights of DCLW are a statistic of the batch, of all ranks together."""

import torch
from support.ranks import Ranks
from support.toys import make_method, make_views
from torch import Tensor

from icl_msr.core.distributed import rank, world_size
from icl_msr.losses.contrastive import decoupled, von_mises_fisher_weights
from icl_msr.methods import Step


def on_this_rank(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = (t.chunk(world_size())[rank()].clone().requires_grad_() for t in (first, second))
    loss = decoupled(a, b, 0.2, 0.5)
    loss.backward()
    assert a.grad is not None
    return von_mises_fisher_weights(a, b, 0.5), loss.detach(), a.grad


def test_the_weights_are_those_of_the_global_batch(two_ranks: Ranks) -> None:
    first, second = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights, loss, gradient = on_this_rank(first, second)
    torch.testing.assert_close(weights.mean(), torch.ones((), dtype=torch.float64))
    found = list(zip(*two_ranks(on_this_rank, first, second), strict=True))
    torch.testing.assert_close(torch.cat(found[0]), weights)
    torch.testing.assert_close(torch.stack(found[1]).mean(), loss)
    torch.testing.assert_close(torch.cat(found[2]) / 2, gradient)


def test_sigma_makes_it_dclw() -> None:
    views = make_views()
    losses = []
    for sigma in (None, 0.5):
        method = make_method("dcl", sigma=sigma)
        output = method(views, method.targets(views), Step(0, 10))
        torch.testing.assert_close(output.loss, decoupled(*output.embeddings, method.temperature, sigma))
        losses.append(output.loss)
    assert losses[0] != losses[1]
