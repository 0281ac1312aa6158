"""What is special to CMC: who meets whom, in which colour space, in the loss, the queues and the pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.toys import make_method, make_views
from torch import Tensor

from icl_msr.core.views import NonSemantic
from icl_msr.methods import CMC, Step
from icl_msr.methods.base import Targets

STEP = Step(0, 10)


def make_cmc(**keys: object) -> CMC:
    method = make_method("cmc", **keys)
    assert isinstance(method, CMC)
    return method


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("negatives", [0, 2])
def test_the_loss_by_hand(negatives: int, views: int) -> None:
    """Equations 2 and 4 with the queues in place of the noise samples, anchor by anchor."""
    method, tau, n, alpha = make_cmc(temperature=0.3), 0.3, 3, 1.5
    method.observe(Targets(), list(random(4, 10, 6, seed=2)))  # both queues begin alike
    rows = random(n, negatives, 12, seed=1)
    targets = Targets(negatives=NonSemantic(rows, alpha, 0.25) if negatives else None)
    embeddings = list(random(2 * views, n, 6))
    cosine = lambda a, b: float(F.cosine_similarity(a, b, dim=0))  # noqa: E731
    total = 0.0
    for view in range(views):
        light, colour = embeddings[view], embeddings[views + view]
        for i in range(n):
            for anchor, positive, queue, textures in (
                (light[i], colour[i], method.queue_ab.keys, rows[i, :, 6:]),
                (colour[i], light[i], method.queue_l.keys, rows[i, :, :6]),
            ):
                found = math.exp(cosine(anchor, positive) / tau)
                others = sum(math.exp(cosine(anchor, key) / tau) for key in queue)
                others += sum(math.exp(alpha * cosine(anchor, texture) / tau) for texture in textures)
                total -= math.log(found / (found + others))
    assert float(method.loss(embeddings, targets, STEP)) == pytest.approx(total / (2 * views * n), rel=1e-10)


def test_gradients_reach_anchors_and_positives() -> None:
    method = make_cmc()
    inputs = [t.clone().requires_grad_() for t in random(4, 3, 6)]
    assert torch.autograd.gradcheck(lambda *e: method.loss(e, Targets(), STEP), inputs)


def test_views_are_averaged() -> None:
    method, losses = make_cmc().eval(), []
    for chosen in (slice(0, 1), slice(1, 2), slice(0, 2)):
        views = make_views(negatives=1)
        views.views = views.views[chosen]
        losses.append(method(views, method.targets(views), STEP).loss)
    torch.testing.assert_close((losses[0] + losses[1]) / 2, losses[2])


def test_each_encoder_sees_its_own_channels() -> None:
    """Of gray images, the colours say nothing: all their ab embeddings are one, and those of L differ."""
    method, views = make_cmc().eval(), make_views()
    views.views = [view[:, :1].expand(-1, 3, -1, -1) for view in views.views]
    first_l, second_l, first_ab, second_ab = method(views, method.targets(views), STEP).embeddings
    torch.testing.assert_close(first_ab, first_ab[:1].expand(6, -1))
    torch.testing.assert_close(second_ab, first_ab)
    assert (first_l - first_l[0]).norm(dim=1)[1:].min() > 1e-3
    assert not torch.allclose(second_l, first_l)


def test_pairs_cross_the_colour_spaces() -> None:
    method, views = make_cmc(), make_views()
    output = method(views, method.targets(views), STEP)
    light, colour = output.embeddings[:2], output.embeddings[2:]
    assert len(output.pairs) == 4
    for view, (there, back) in enumerate(zip(output.pairs[::2], output.pairs[1::2], strict=True)):
        of_l, of_ab = output.features[view].chunk(2, dim=1)
        for pair, anchor, key, features, head, queue in (
            (there, light, colour, of_ab, method.projector_ab, method.queue_ab),
            (back, colour, light, of_l, method.projector_l, method.queue_l),
        ):
            assert pair.anchor is anchor[view]
            assert pair.key is key[view]
            assert torch.equal(pair.key_features, features)
            assert pair.head is head
            assert pair.bank is queue.keys


def test_each_queue_takes_its_own_colour_space_in() -> None:
    method = make_cmc()
    embeddings = list(random(4, 3, 6))
    method.observe(Targets(), embeddings)
    for queue, newest in ((method.queue_l, embeddings[:2]), (method.queue_ab, embeddings[2:])):
        torch.testing.assert_close(queue.keys[:6], F.normalize(torch.cat(newest)))


def test_the_originals_head_is_one_linear_layer() -> None:
    assert [type(layer) for layer in make_cmc(hidden_dim=None).projector_l] == [torch.nn.Linear]
