"""What is DINO's own: the centre, the teacher's temperature, and a last layer that starts late."""

import pytest
import torch
from support.tiny import trained
from support.toys import make_method, make_views

from icl_msr.losses.clustering import self_distillation
from icl_msr.losses.contrastive import unit
from icl_msr.methods import DINO, Step
from icl_msr.models.momentum import rising_momentum


def dino(**keys: float) -> DINO:
    """A student that is no longer its teacher."""
    method = make_method("dino", **keys)
    assert isinstance(method, DINO)
    with torch.no_grad():
        for parameter in (*method.backbone.parameters(), *method.projector.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def epoch(number: float) -> Step:
    return Step(int(10 * number), 1000, epochs=100)


LATE = epoch(90)


def test_the_teacher_sees_both_global_views() -> None:
    method, views = dino().eval(), make_views()
    assert isinstance(method, DINO)
    torch.testing.assert_close(method.targets(views).embeddings, [method.momentum_encoder(v) for v in views.views])


def test_student_and_teacher_score_by_their_own_prototypes() -> None:
    method, views = dino(), make_views()
    method.centre = torch.randn(10, dtype=torch.float64)
    student = torch.stack(
        [unit(e) @ unit(method.projector.prototypes).T for e in method(views, method.targets(views), LATE).embeddings]
    )
    teacher = torch.stack([unit(e) @ unit(method.teacher_prototypes).T for e in method.targets(views).embeddings])
    expected = self_distillation(student, teacher, method.centre, 0.1, 0.07)
    torch.testing.assert_close(method(views, method.targets(views), LATE).loss, expected)


def test_the_centre_follows_the_teachers_mean_scores() -> None:
    method, centre = dino(centre_momentum=0.9), torch.zeros(10, dtype=torch.float64)
    for seed in range(3):
        views = make_views(seed=seed)
        targets = method.targets(views)
        scores = torch.cat([unit(z) @ unit(method.teacher_prototypes).T for z in targets.embeddings])  # (2N, K)
        centre = 0.9 * centre + 0.1 * scores.mean(0)
        method.observe(targets, [])
        torch.testing.assert_close(method.centre, centre)


def test_the_centre_moves_in_observe_alone_and_after_the_loss() -> None:
    method, views = dino(), make_views()
    targets = method.targets(views)
    before = method(views, targets, epoch(0)).loss
    method.advance(epoch(0))
    assert not method.centre.any()
    method.observe(targets, [])
    assert method.centre.all()
    assert (method(views, targets, epoch(0)).loss - before).abs() > 1e-4  # and the next loss is another


def test_the_teacher_grows_softer_and_then_stays() -> None:
    method = dino(warmup_teacher_temperature=0.04, teacher_temperature=0.07, warmup_epochs=30.0)
    temperatures = [method.teacher_temperature(epoch(e)) for e in (0, 10, 20, 30, 31, 100)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert dino(warmup_epochs=0.0).teacher_temperature(epoch(0)) == 0.07
    views = make_views()
    targets = method.targets(views)
    losses = [float(method(views, targets, epoch(e)).loss.detach()) for e in (0, 30, 100)]
    assert losses[1] == losses[2] != losses[0]


def test_the_last_layer_waits() -> None:
    method = dino(freeze_epochs=2.0)
    assert list(method.frozen(epoch(1.9))) == [method.projector.prototypes]
    assert not list(method.frozen(epoch(2)))


def test_the_length_of_a_prototype_means_nothing() -> None:
    method, views = dino(), make_views()
    targets = method.targets(views)
    loss = method(views, targets, epoch(0)).loss
    with torch.no_grad():
        method.projector.prototypes.mul_(torch.linspace(0.5, 2, 10)[:, None])
        method.teacher_prototypes.mul_(3)
    torch.testing.assert_close(method(views, targets, epoch(0)).loss, loss)


def test_the_teacher_follows_with_its_prototypes() -> None:
    method, momentum = dino(momentum=0.9), rising_momentum(0.9, 0.5)
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    method.advance(Step(5, 10))
    students = [*method.backbone.parameters(), *method.projector.parameters()]
    for after, old, student in zip(method.momentum_encoder.parameters(), before, students, strict=True):
        torch.testing.assert_close(after, momentum * old + (1 - momentum) * student)


def test_a_head_without_batch_norm_has_biases_instead() -> None:
    names = [name for name, _ in dino(batch_norm=False).projector.named_parameters()]
    assert names == ["prototypes", *(f"mlp.{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias"))]


def test_a_run_with_local_crops() -> None:
    words = ("method=dino", "augment=multicrop", "regularizer=none", "method.prototypes=20", "method.freeze_epochs=0.0")
    module, _ = trained(*words)
    assert isinstance(module.method, DINO)
    assert module.method.centre.any()
    assert not torch.equal(module.method.projector.prototypes, module.method.teacher_prototypes)
