"""Against torch's divergence, against the paper's formula written out slowly, and the identities of a relation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from icl_msr.losses.contrastive import unit
from icl_msr.losses.relational import relation


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENTS, TEACHERS, BANK = random(7, 5), random(7, 5, seed=1), random(11, 5, seed=2)


def test_relation_follows_the_formula() -> None:
    terms = []
    for student, teacher in zip(unit(STUDENTS), unit(TEACHERS), strict=True):
        p = torch.stack([torch.exp(teacher @ other / 0.04) for other in unit(BANK)])
        q = torch.stack([torch.exp(student @ other / 0.1) for other in unit(BANK)])
        terms.append(-(p / p.sum() * torch.log(q / q.sum())).sum())
    torch.testing.assert_close(relation(STUDENTS, TEACHERS, BANK, 0.1, 0.04), torch.stack(terms).mean())


def test_relation_is_the_divergence_and_the_teachers_entropy() -> None:
    target = (unit(TEACHERS) @ unit(BANK).T / 0.2).softmax(1)
    divergence = F.kl_div((unit(STUDENTS) @ unit(BANK).T / 0.5).log_softmax(1), target, reduction="batchmean")
    entropy = torch.distributions.Categorical(target).entropy().mean()
    torch.testing.assert_close(relation(STUDENTS, TEACHERS, BANK, 0.5, 0.2), divergence + entropy)


def test_a_student_that_relates_as_its_teacher_has_nothing_to_learn() -> None:
    students = TEACHERS.clone().requires_grad_()
    (same,) = torch.autograd.grad(relation(students, TEACHERS, BANK, 0.2, 0.2), students)
    torch.testing.assert_close(same, torch.zeros_like(same))
    (sharper,) = torch.autograd.grad(relation(students, TEACHERS, BANK, 0.2, 0.1), students)
    assert sharper.norm() > 1e-2


def test_gradients_reach_the_student_alone() -> None:
    students, *others = (t.clone().requires_grad_() for t in (STUDENTS, TEACHERS, BANK))
    assert torch.autograd.gradcheck(lambda x: relation(x, TEACHERS, BANK, 0.1, 0.04), (students,))
    loss = relation(students, *others, 0.1, 0.04)
    assert torch.autograd.grad(loss, others, allow_unused=True) == (None, None)


def test_half_precision_and_autocast_do_not_reach_inside() -> None:
    halves = [t.bfloat16() for t in (STUDENTS, TEACHERS, BANK)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = relation(*halves, 0.1, 0.04)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, relation(*(t.float() for t in halves), 0.1, 0.04), rtol=0, atol=0)
