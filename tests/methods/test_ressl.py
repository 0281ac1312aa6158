"""What is ReSSL's own: a strong view for the student, a weak one for the teacher, and relations to a queue."""

from typing import Any

import pytest
import torch
from support.tiny import composed, pieces
from support.toys import make_method, make_views

from icl_msr.losses.relational import relation
from icl_msr.methods import ReSSL, Step

STEP = Step(0, 10)
WEAK = {"jitter_probability": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0}


def ressl(**keys: Any) -> ReSSL:
    method = make_method("ressl", **keys)
    assert isinstance(method, ReSSL)
    return method


@pytest.mark.parametrize("words", [(), ("dataset=cifar10",), ("dataset=cifar10", "augment=imagenet")])
def test_the_method_asks_for_a_weak_second_view(words: tuple[str, ...]) -> None:
    own = composed(*words).augment
    augment = composed("method=ressl", *words).augment
    assert augment.views == [{}, WEAK]
    assert {**augment, "views": own.views} == own
    assert composed("method=ressl", *words, "augment.views=[{},{blur:1.0}]").augment.views == [{}, {"blur": 1.0}]


def test_the_weak_view_is_a_crop_with_its_own_colours() -> None:
    """An image of one colour keeps it in the weak view, whatever the strong one does to it."""
    _, _, data = pieces("method=ressl", "regularizer=none")
    images = torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8).expand(8, 3, 32, 32)  # one colour each
    keys: dict[str, Any] = {"seed": 0, "epoch": 0, "size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    strong, weak = data.augmentation(images, torch.arange(8), **keys)
    torch.testing.assert_close(weak, images.float() / 255)
    assert (strong - images / 255).abs().amax(dim=(1, 2, 3)).median() > 0.05


def test_the_student_sees_the_first_view_and_the_teacher_the_second() -> None:
    method, views = ressl().eval(), make_views()
    assert isinstance(method, ReSSL)
    targets = method.targets(views)
    student = method.projector(method.backbone(views.views[0]))
    teacher = method.momentum_encoder(views.views[1])
    torch.testing.assert_close(targets.embeddings, [teacher])
    expected = relation(student, teacher, method.queue.keys, 0.1, 0.04)
    torch.testing.assert_close(method(views, targets, STEP).loss, expected)


def test_no_image_is_related_to_itself() -> None:
    """Its own key, which is the nearest of all to the teacher, enters the queue after the loss."""
    method, views = ressl(), make_views()
    targets = method.targets(views)
    before = method(views, targets, STEP).loss
    method.observe(targets, [])
    torch.testing.assert_close(method.queue.keys[:6], torch.nn.functional.normalize(targets.embeddings[0]))
    assert (method(views, targets, STEP).loss - before).abs() > 1e-2


def test_the_teacher_follows_at_one_pace() -> None:
    method = ressl(momentum=0.9)
    with torch.no_grad():
        for parameter in (*method.backbone.parameters(), *method.projector.parameters()):
            parameter.add_(1)
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    method.advance(Step(5, 10))
    for after, old in zip(method.momentum_encoder.parameters(), before, strict=True):
        torch.testing.assert_close(after, old + 0.1)
