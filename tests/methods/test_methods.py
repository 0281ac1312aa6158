"""What every method must hold: the contract of `icl_msr.methods.base`."""

import math
from dataclasses import replace

import pytest
import torch
from support.toys import METHODS, make_method, make_views, skip_refused
from torch import Tensor
from torch.func import functional_call

from icl_msr.methods import BYOL, Method, MoCo, Step, Targets
from icl_msr.models.momentum import Queue, rising_momentum
from icl_msr.regularizers.bilevel import trainable

STEP = Step(0, 10)


def snapshot(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


def changed(method: Method, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("negatives", [0, 2])
def test_functional_call_equals_the_direct_call(method: Method, negatives: int) -> None:
    views = make_views(negatives=negatives)
    targets = method.targets(views)
    theta = {name: p.detach().clone().requires_grad_() for name, p in trainable(method).items()}
    direct, functional = method(views, targets, STEP), functional_call(method, theta, (views, targets, STEP))
    torch.testing.assert_close(direct.loss, functional.loss, rtol=0, atol=0)
    expected = torch.autograd.grad(direct.loss, list(trainable(method).values()), allow_unused=True)
    gradients = torch.autograd.grad(functional.loss, list(theta.values()), allow_unused=True)
    for a, b in zip(expected, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_loss_writes_no_state_but_running_statistics(method: Method) -> None:
    before, views = snapshot(method), make_views(negatives=1)
    method(views, method.targets(views), STEP).loss.backward()
    assert all("running_" in name or "num_batches" in name for name in changed(method, before))


def test_negatives_leave_the_running_statistics_alone(method: Method) -> None:
    """The evaluated encoder's statistics must come from images, never from textures."""
    with_negatives = snapshot(method)
    method.targets(make_views(negatives=2))
    moved = {name: value.clone() for name, value in method.state_dict().items()}
    method.load_state_dict(with_negatives)
    method.targets(make_views())
    assert all(torch.equal(value, moved[name]) for name, value in method.state_dict().items())


def test_negatives_raise_the_loss_of_a_method_with_a_denominator() -> None:
    for name in ("simclr", "moco", "moco_v3", "nnclr", "dcl", "debiased", "lmcl", "relic"):
        method = make_method(name)
        views, plain = make_views(negatives=1), make_views()
        loss = method(views, method.targets(views), STEP).loss
        assert loss > method(plain, method.targets(plain), STEP).loss


def test_what_is_measured_of_negatives_is_what_the_loss_compares(method: Method) -> None:
    """The loss moves a negative of unit length along the anchors that it is said to meet, and nowhere else."""
    skip_refused(method, "negatives")
    views = make_views(negatives=2)
    targets = method.targets(views)
    output = method(views, targets, STEP)
    assert targets.negatives is not None
    rows = targets.negatives.rows.requires_grad_()
    (gradient,) = torch.autograd.grad(method.loss(output.embeddings, targets, STEP), rows)
    moves = method.non_semantic(replace(targets, negatives=replace(targets.negatives, rows=gradient)), output.pairs)
    for met, move in zip(method.non_semantic(targets, output.pairs), moves, strict=True):
        meets = [p.anchor for p, m in zip(output.pairs, moves, strict=True) if m.data_ptr() == move.data_ptr()]
        assert all(anchor.shape[1] == met.shape[2] for anchor in meets)
        for image in range(len(met)):
            for t, towards in zip(met[image], move[image], strict=True):
                basis = torch.stack([t, *(anchor[image] for anchor in meets)]).detach().T
                along = basis @ torch.linalg.lstsq(basis, towards[:, None], driver="gelsd").solution
                assert towards.norm() > 0
                torch.testing.assert_close(along[:, 0], towards)
    assert method.non_semantic(Targets(), output.pairs) == []


def test_no_gradient_reaches_targets_or_momentum_encoders(method: Method) -> None:
    views = make_views(negatives=1)
    targets = method.targets(views)
    tensors = [*targets.features, *targets.embeddings]
    if targets.negatives is not None:
        tensors.append(targets.negatives.rows)
    assert not any(t.requires_grad for t in tensors)
    method(views, targets, STEP).loss.backward()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None)
        assert not (parameter.requires_grad and "momentum_encoder" in name)


def test_keys_are_the_head_of_the_key_features(method: Method) -> None:
    method.eval()  # running statistics, so that rows do not influence each other
    views = make_views()
    for pair in method(views, method.targets(views), STEP).pairs:
        torch.testing.assert_close(pair.head(pair.key_features), pair.key)


def test_moco_never_compares_a_query_with_its_own_key_twice() -> None:
    method = make_method("moco")
    views = make_views()
    targets = method.targets(views)
    before = method(views, targets, STEP).loss
    method.observe(targets, [])
    assert isinstance(method, MoCo)
    torch.testing.assert_close(method.queue.keys[:6], torch.nn.functional.normalize(targets.embeddings[0]))
    assert method(views, targets, STEP).loss > before  # the key, now in the queue, counts as a negative too


def test_momentum_encoder_follows_on_advance_alone() -> None:
    for name, momentum in (("moco", 0.9), ("byol", rising_momentum(0.9, 0.5))):
        method = make_method(name)
        assert isinstance(method, MoCo | BYOL)
        with torch.no_grad():
            for parameter in method.backbone.parameters():
                parameter.add_(1)
        mine = [p.clone() for p in method.momentum_encoder.backbone.parameters()]
        method.advance(Step(5, 10))
        for after, before in zip(method.momentum_encoder.backbone.parameters(), mine, strict=True):
            torch.testing.assert_close(after, before + (1 - momentum))


def test_rising_momentum() -> None:
    assert rising_momentum(0.99, 0.0) == pytest.approx(0.99)
    assert rising_momentum(0.99, 1.0) == 1.0
    assert rising_momentum(0.99, 0.25) == pytest.approx(1 - 0.01 * (math.cos(math.pi / 4) + 1) / 2)


def test_queue_wraps_and_keeps_the_newest() -> None:
    queue = Queue(5, 2)
    rows = torch.nn.functional.normalize(torch.randn(9, 2))
    for batch in rows.split(3):
        queue.push(batch)
    assert int(queue.position) == 9 % 5
    for i in range(4, 9):  # row i lies in slot i mod 5
        torch.testing.assert_close(queue.keys[i % 5], rows[i])
    queue.push(rows)
    torch.testing.assert_close(queue.keys.sort(0).values, rows[-5:].sort(0).values)


def test_batch_norm_per_view() -> None:
    """Each view gives what it gives alone, in all networks; together they differ."""
    apart, together = make_method("byol", batch_norm_per_view=True), make_method("byol", batch_norm_per_view=False)
    views = make_views()
    single = replace(views, views=views.views[:1])
    for method, same in ((apart, True), (together, False)):
        features, targets = method.encode(views), method.targets(views)
        both = (features[0], method.project(features)[0], targets.embeddings[0])
        alone = (
            method.encode(single)[0],
            method.project(features[:1])[0],
            method.targets(single).embeddings[0],
        )
        assert [torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(both, alone, strict=True)] == [same] * 3


def test_a_projector_may_end_with_batch_norm() -> None:
    method, views = make_method("simclr", batch_norm_last=True), make_views()
    rows = torch.cat(method.project(method.encode(views)))
    torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), atol=1e-10, rtol=0)
    torch.testing.assert_close(rows.var(0, unbiased=False), torch.ones_like(rows[0]), atol=1e-2, rtol=0)


def test_negatives_pass_one_at_a_time() -> None:
    """Two negatives of an image are normalised as one is, whatever the other shows."""
    method, views = make_method("moco"), make_views(negatives=2)
    assert views.negatives is not None
    whole = method.targets(views).negatives
    first = replace(views, negatives=replace(views.negatives, rows=views.negatives.rows[:, :1]))
    alone = method.targets(first).negatives
    assert whole is not None
    assert alone is not None
    assert torch.equal(whole.rows[:, :1], alone.rows)


def test_a_queue_hides_an_earlier_batch() -> None:
    queue = Queue(7, 12)
    for batch in torch.eye(12).split(3):
        queue.push(batch)
    whole = queue.keys
    for batch in range(4):
        with queue.without(3, newer=3 * (3 - batch)):
            shown = sorted(queue.keys.argmax(1).tolist())
        assert shown == [image for image in range(5, 12) if image // 3 != batch]
        assert queue.keys is whole


@pytest.mark.parametrize("name", list(METHODS))
def test_training_lowers_the_loss(name: str) -> None:
    method, views = make_method(name), make_views(n=12)
    if not any(p.requires_grad for p in method.backbone.parameters()):
        pytest.skip("its encoder is not trained")
    optimizer = torch.optim.Adam(trainable(method).values(), lr=1e-2)
    losses = []
    for index in range(40):
        targets = method.targets(views)
        loss = method(views, targets, Step(index, 40)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.advance(Step(index, 40))
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0])  # some losses are negative
