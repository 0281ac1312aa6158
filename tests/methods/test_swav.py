"""What is SwAV's own: a queue for the assignments that starts late, and prototypes that start late too."""

import pytest
import torch
from support.tiny import AfterBatch, trained
from support.toys import make_method, make_views

from icl_msr.losses.clustering import cosines, swapped_prediction
from icl_msr.losses.contrastive import unit
from icl_msr.methods import Method, Step, SwAV


def swav(**keys: float) -> SwAV:
    method = make_method("swav", **keys)
    assert isinstance(method, SwAV)
    return method


def epoch(number: float) -> Step:
    return Step(int(10 * number), 1000, epochs=100)


def loss(method: Method, step: Step) -> float:
    views = make_views()
    return float(method(views, method.targets(views), step).loss.detach())


def fill(method: SwAV) -> None:
    """The queues hold other images than at the start."""
    for seed in range(1, 5):
        views = make_views(seed=seed)
        method.observe(
            method.targets(views), [e.detach() for e in method(views, method.targets(views), epoch(0)).embeddings]
        )


def test_the_queue_takes_part_from_its_epoch_on() -> None:
    method = swav(queue_from_epoch=5.0)
    early, late = loss(method, epoch(4.9)), loss(method, epoch(5))
    fill(method)
    assert loss(method, epoch(4.9)) == pytest.approx(early, abs=1e-12)
    assert abs(loss(method, epoch(5)) - late) > 1e-3


def test_the_queues_hold_each_global_views_projections() -> None:
    method, views = swav(queue_size=12), make_views()
    embeddings = [e.detach() for e in method(views, method.targets(views), epoch(0)).embeddings]
    method.observe(method.targets(views), embeddings)
    keys = torch.stack([method.first_queue.keys, method.second_queue.keys])
    torch.testing.assert_close(keys[:, :6], unit(torch.stack(embeddings)))
    scores = cosines(torch.stack(embeddings), method.prototypes.detach())
    expected = swapped_prediction(scores, 0.1, 0.05, 3, cosines(keys, method.prototypes.detach()))
    assert loss(method, epoch(50)) == pytest.approx(float(expected))


def test_assigning_half_a_batch_with_the_other_half_queued_is_assigning_it_whole() -> None:
    method, views = swav(queue_size=6, queue_from_epoch=0.0).eval(), make_views(12)
    assert isinstance(method, SwAV)
    embeddings = [e.detach() for e in method(views, method.targets(views), epoch(0)).embeddings]
    whole, halves = cosines(torch.stack(embeddings), method.prototypes.detach()), []
    for mine, other in ((slice(0, 6), slice(6, 12)), (slice(6, 12), slice(0, 6))):
        method.observe(method.targets(views), [e[other] for e in embeddings])
        halves.append(method.loss([e[mine] for e in embeddings], method.targets(make_views()), epoch(0)))
    torch.testing.assert_close(torch.stack(halves).mean().detach(), swapped_prediction(whole, 0.1, 0.05, 3))


def test_prototypes_wait() -> None:
    method = swav(freeze_epochs=2.0)
    assert list(method.frozen(epoch(1.9))) == [method.prototypes]
    assert not list(method.frozen(epoch(2)))


def test_prototypes_stay_on_the_sphere() -> None:
    method = swav()
    with torch.no_grad():
        method.prototypes.mul_(torch.linspace(0.5, 2, 10)[:, None])
    before = loss(method, epoch(0))
    method.advance(epoch(0))
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(10, dtype=torch.float64))
    assert loss(method, epoch(0)) == pytest.approx(before)


def test_a_run_with_local_crops() -> None:
    """Prototypes stand still for one epoch of 2 batches, then move; the queues take every batch in."""
    words = ("method=swav", "augment=multicrop", "regularizer=none", "method.prototypes=20", "method.queue_size=40")
    look = AfterBatch(
        lambda module: (module.method.prototypes.detach().clone(), int(module.method.second_queue.position))
    )
    trained(*words, callbacks=[look], max_epochs=2)
    prototypes, positions = zip(*look.seen, strict=True)
    assert positions == (8, 16, 24, 32)
    torch.testing.assert_close(prototypes[1], prototypes[0])
    assert all((prototypes[i] - prototypes[0]).abs().max() > 1e-4 for i in (2, 3))
