"""Implicit feature modification against loops, and against moved features themselves."""

import pytest
import torch
from support.exactness import error, flat, my_views
from support.ranks import Ranks
from support.toys import make_method, make_views
from torch import Tensor
from torch.nn.functional import normalize

from icl_msr.core.distributed import world_size
from icl_msr.methods import Output, Pair, Step
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.regularizers import ImplicitFeatureModification
from icl_msr.regularizers.bilevel import gradients, trainable
from icl_msr.regularizers.ifm import modified

EPSILON, TAU = 0.1, 0.3


def outputs(name: str) -> Output:
    method, views = make_method(name, **{} if name == "byol" else {"temperature": TAU}), make_views()
    output: Output = method(views, method.targets(views), Step(0, 10, logs=True))
    return output


def slowly(pair: Pair, pairs: list[Pair], epsilon: float) -> Tensor:
    """Go over anchors and negatives one by one."""
    terms = []
    for i, anchor in enumerate(normalize(pair.anchor)):
        positive = torch.exp((anchor @ normalize(pair.key[i], dim=0) - epsilon) / TAU)
        if pair.bank is not None:
            negatives = list(normalize(pair.bank))
        else:
            negatives = [key for other in pairs for k, key in enumerate(normalize(other.key)) if k != i]
        against = torch.stack([torch.exp((anchor @ key + epsilon) / TAU) for key in negatives]).sum()
        terms.append(-torch.log(positive / (positive + against)))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_the_loss_is_that_of_a_loop(name: str) -> None:
    output = outputs(name)
    regularizer = ImplicitFeatureModification(TAU, epsilon=EPSILON, lam=0.7, temperature=None)
    loss = regularizer(make_views(), output, Step(0, 10))
    expected = torch.stack([slowly(pair, output.pairs, EPSILON) for pair in output.pairs]).mean()
    torch.testing.assert_close(loss, 0.7 * expected)
    torch.testing.assert_close(output.log["loss/ifm"], expected.detach())


def test_without_a_shift_it_is_the_methods_own_loss() -> None:
    output = outputs("simclr")
    losses = [modified(pair, output.pairs, TAU, 0.0) for pair in output.pairs]
    torch.testing.assert_close(torch.stack(losses).mean(), output.loss)


def test_the_shift_is_that_of_moved_features() -> None:
    """Moving a key by epsilon along the anchor, towards it or away from it, moves its similarity by epsilon."""
    pair = outputs("moco").pairs[0]
    assert pair.bank is not None
    anchor, key, bank = normalize(pair.anchor), normalize(pair.key), normalize(pair.bank)
    moved_key = key - EPSILON * anchor
    moved_bank = bank[None] + EPSILON * anchor[:, None]
    logits = torch.cat([(anchor * moved_key).sum(1, keepdim=True), torch.einsum("nd,nkd->nk", anchor, moved_bank)], 1)
    expected = torch.nn.functional.cross_entropy(logits / TAU, torch.zeros(len(anchor), dtype=torch.int64))
    torch.testing.assert_close(modified(pair, [pair], TAU, EPSILON), expected)


def gradient(name: str) -> Tensor:
    """Return the gradient of the loss on the images of this rank, averaged over ranks, as one vector."""
    method, views = make_method(name, temperature=TAU), my_views(make_views(8))
    if world_size() > 1:
        global_batch_norm(method)
    output = method(views, method.targets(views), Step(0, 10))
    regularizer = ImplicitFeatureModification(TAU, epsilon=EPSILON, lam=1.0, temperature=None)
    return flat(gradients(regularizer(views, output, Step(0, 10)), trainable(method)))


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_ranks_equal_one_process(ranks: Ranks, name: str) -> None:
    expected = gradient(name)
    assert expected.any()
    for found in ranks(gradient, name):
        assert error(found, expected) <= 1e-10
