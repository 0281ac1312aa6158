"""Methods that take local crops beside the two global ones: two sizes, two passes, one contract."""

from dataclasses import replace

import pytest
import torch
from support.exactness import TOLERANCE, error, flat, my_views
from support.ranks import Ranks
from support.toys import make_method, make_regularizer, make_views
from torch import Tensor
from torch.func import functional_call

from icl_msr.core.distributed import average, world_size
from icl_msr.core.views import Views
from icl_msr.methods import Step
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.regularizers.bilevel import meta_pass, trainable

MULTICROP = ["dino", "swav"]
STEP = Step(9, 10, noise=3, epochs=100)
"""Late enough for all that starts later."""


def multicrop(n: int = 6, negatives: int = 0) -> Views:
    """Two global crops of 8 pixels and two local ones of 7."""
    views = make_views(n, negatives=negatives)
    return replace(views, views=[*views.views, *(view[..., 1:, :7] for view in views.views)])


@pytest.mark.parametrize("name", MULTICROP)
def test_each_size_is_one_pass_of_the_backbone(name: str) -> None:
    method, views, sizes = make_method(name), multicrop(), list[tuple[int, int]]()
    method.backbone.register_forward_hook(lambda _, inputs, __: sizes.append((len(inputs[0]), inputs[0].shape[-1])))
    output = method(views, method.targets(views), STEP)
    assert sizes == [(12, 8), (12, 7)]
    assert [len(z) for z in output.embeddings] == 4 * [6]


@pytest.mark.parametrize("name", MULTICROP)
def test_local_crops_predict_and_are_never_predicted(name: str) -> None:
    """Only the loss depends on them: neither the targets nor what the regularizer compares. Each global view counts."""
    method, views = make_method(name).eval(), multicrop()  # running statistics, so that views do not influence others
    fewer = replace(views, views=views.views[:2])
    targets = method.targets(views)
    for a, b in zip(targets.embeddings, method.targets(fewer).embeddings, strict=True):
        torch.testing.assert_close(a, b)
    output, plain = method(views, targets, STEP), method(fewer, targets, STEP)
    assert len(output.pairs) == len(plain.pairs) == 2
    for a, b in zip(output.pairs, plain.pairs, strict=True):
        torch.testing.assert_close((a.anchor, a.key, a.key_features), (b.anchor, b.key, b.key_features))
    first, second = (
        float(method(replace(views, views=[*views.views[:2], view]), targets, STEP).loss.detach())
        for view in views.views[2:]
    )
    # Of 2 (V - 1) equally weighted pairs of views, 2 are global, and each local view brings 2.
    whole, local = float(output.loss.detach()), 2 * (first + second) - 2 * float(plain.loss.detach())
    assert 3 * whole == pytest.approx(local + float(plain.loss.detach()))


@pytest.mark.parametrize("name", MULTICROP)
def test_functional_call_equals_the_direct_call(name: str) -> None:
    method, views = make_method(name), multicrop(negatives=2)
    targets = method.targets(views)
    theta = {n: p.detach().clone().requires_grad_() for n, p in trainable(method).items()}
    direct, functional = method(views, targets, STEP), functional_call(method, theta, (views, targets, STEP))
    torch.testing.assert_close(direct.loss, functional.loss, rtol=0, atol=0)
    expected = torch.autograd.grad(direct.loss, list(trainable(method).values()))
    for a, b in zip(expected, torch.autograd.grad(functional.loss, list(theta.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", MULTICROP)
def test_forward_mode_equals_double_backward(name: str) -> None:
    method, views, both = make_method(name), multicrop(negatives=1), []
    for mode in ("exact", "double_backward"):
        regularizer = make_regularizer(method, mode=mode)
        with meta_pass(method, views.images.device):
            targets = method.targets(views)
            inner = regularizer.inner_gradient(method, views, targets, STEP)
            signal = regularizer.meta_gradient(method, views, targets, STEP, inner, 0.1)
        both.append(torch.cat([s.flatten() for s in signal]))
    forward, double = both
    assert double.abs().max() > 0
    assert (forward - double).abs().max() <= 1e-9 * double.abs().max()


def two_steps(name: str) -> dict[str, dict[str, Tensor]]:
    """Loss, gradient and state of the second of two batches, so that queue and centre are no longer the first ones."""
    method = make_method(name)
    if world_size() > 1:
        global_batch_norm(method)
    for seed in range(2):
        views = multicrop(8, negatives=1)
        noise = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        views = my_views(replace(views, views=[view * noise for view in views.views]))
        targets = method.targets(views)
        output = method(views, targets, STEP)
        method.observe(targets, [e.detach() for e in output.embeddings])
    theta = trainable(method)
    gradient = average(torch.autograd.grad(output.loss, list(theta.values())))
    loss = average([output.loss.detach()])[0]
    return {
        "loss": {"": loss},
        "theta": dict(zip(theta, gradient, strict=True)),
        "buffers": dict(method.named_buffers()),
    }


@pytest.mark.parametrize("name", MULTICROP)
def test_ranks_equal_one_process(ranks: Ranks, name: str) -> None:
    expected = two_steps(name)
    for found in ranks(two_steps, name):
        for part, tensors in expected.items():
            assert found[part].keys() == tensors.keys()
            assert error(flat(found[part]), flat(tensors)) <= TOLERANCE, part
