"""Against lightly, against the papers' formulas written out slowly, and against the finite-difference gradient."""

import pytest
import torch
from lightly.loss import DINOLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightlys_sinkhorn
from torch import Tensor
from torch.nn.functional import normalize

from icl_msr.losses.clustering import cosines, self_distillation, sinkhorn, swapped_prediction


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PROTOTYPES = random(5, 3)
SCORES = normalize(random(4, 7, 3, seed=1), dim=-1) @ normalize(PROTOTYPES).T  # two global views and two local ones
QUEUED = normalize(random(2, 6, 3, seed=2), dim=-1) @ normalize(PROTOTYPES).T
TEACHER, CENTRE = random(2, 7, 5, seed=3), random(5, seed=4)


def test_scores_are_cosines_at_any_length() -> None:
    embeddings = random(2, 7, 3, seed=5)
    scores = cosines(embeddings, PROTOTYPES)
    expected = torch.nn.functional.cosine_similarity(embeddings[:, :, None], PROTOTYPES, dim=-1)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(cosines(3 * embeddings, 5 * PROTOTYPES), scores)


def test_prototypes_move_on_the_sphere() -> None:
    prototypes = PROTOTYPES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cosines(random(7, 3), prototypes).exp().sum(), prototypes)
    assert gradient.norm() > 0
    torch.testing.assert_close((gradient * prototypes).sum(1), torch.zeros(5, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- assignments


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_sinkhorn_equals_lightly(epsilon: float, iterations: int) -> None:
    expected = lightlys_sinkhorn(SCORES[0], iterations, epsilon)
    torch.testing.assert_close(sinkhorn(SCORES[0], epsilon, iterations), expected)


def test_sinkhorn_follows_the_matrix_form() -> None:
    """Q = Diag(u) exp(scores / epsilon) Diag(v), by turns scaled to both marginals (eq. 5)."""
    rows = torch.cat([SCORES[0], QUEUED[0]])
    kernel, u, v = (rows.T / 0.2).exp(), torch.ones(5, dtype=torch.float64), torch.ones(13, dtype=torch.float64)
    for _ in range(4):
        u = 1 / 5 / (kernel @ v)
        v = 1 / 13 / (kernel.T @ u)
    expected = 13 * (u[:, None] * kernel * v).T[:7]
    torch.testing.assert_close(sinkhorn(SCORES[0], 0.2, 4, QUEUED[0]), expected)


def test_assignments_are_doubly_stochastic() -> None:
    alone = sinkhorn(SCORES[:2], 0.2, 100)
    torch.testing.assert_close(alone.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    torch.testing.assert_close(alone.sum(-2), torch.full((2, 5), 7 / 5, dtype=torch.float64))
    everyone = torch.cat([sinkhorn(SCORES[:2], 0.2, 100, QUEUED), sinkhorn(QUEUED, 0.2, 100, SCORES[:2])], dim=-2)
    torch.testing.assert_close(everyone.sum(-2), torch.full((2, 5), 13 / 5, dtype=torch.float64))


def test_no_prototype_is_preferred_by_its_level() -> None:
    """What is added to all scores of a prototype changes no assignment: that is what keeps one from taking all."""
    torch.testing.assert_close(sinkhorn(SCORES[0] + random(5), 0.2, 2), sinkhorn(SCORES[0], 0.2, 2))


def test_a_small_epsilon_does_not_overflow() -> None:
    assignments = sinkhorn(SCORES.float(), 1e-3, 3)
    torch.testing.assert_close(assignments.sum(-1), torch.ones(4, 7))
    torch.testing.assert_close(assignments.double(), sinkhorn(SCORES, 1e-3, 3), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------- swapped prediction


@pytest.mark.parametrize("queued", [None, QUEUED])
@pytest.mark.parametrize("views", [2, 4])
def test_swapped_prediction_equals_lightly(views: int, queued: Tensor | None) -> None:
    loss = SwaVLoss(temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05)
    theirs = loss(list(SCORES[:2]), list(SCORES[2:views]), None if queued is None else list(queued))
    torch.testing.assert_close(swapped_prediction(SCORES[:views], 0.1, 0.05, 3, queued), theirs.squeeze())


def cross_entropy(assignments: Tensor, logits: Tensor) -> Tensor:
    """Mean over images of - sum_k q_k log p_k, image by image."""
    terms = []
    for q, row in zip(assignments, logits, strict=True):
        p = row.exp() / row.exp().sum()
        terms.append(-(q * p.log()).sum())
    return torch.stack(terms).mean()


def test_swapped_prediction_follows_the_formula() -> None:
    terms = []
    for view in range(2):
        assignments = sinkhorn(SCORES[view], 0.05, 3)
        terms += [cross_entropy(assignments, SCORES[other] / 0.1) for other in range(4) if other != view]
    torch.testing.assert_close(swapped_prediction(SCORES, 0.1, 0.05, 3), torch.stack(terms).mean())


def test_swapped_prediction_has_no_gradient_through_assignments() -> None:
    """With two views the gradient is that of a cross entropy with fixed targets: softmax minus target."""
    scores = SCORES[:2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(swapped_prediction(scores, 0.1, 0.05, 3), scores)
    targets = sinkhorn(SCORES[:2], 0.05, 3).flip(0)
    torch.testing.assert_close(gradient, ((SCORES[:2] / 0.1).softmax(-1) - targets) / (2 * 7 * 0.1))


def test_gradients_of_local_views() -> None:
    """Assignments do not depend on local views, so the loss is the function whose gradient is taken."""
    local = SCORES[2:].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: swapped_prediction(torch.cat([SCORES[:2], x]), 0.1, 0.05, 3, QUEUED), (local,)
    )


# ---------------------------------------------------------------------------------------------- self-distillation


@pytest.mark.parametrize("views", [2, 4])
def test_self_distillation_equals_lightly(views: int) -> None:
    loss = DINOLoss(output_dim=5, student_temp=0.1)
    loss.center = CENTRE[None, None]
    theirs = loss(list(TEACHER), list(SCORES[:views]), teacher_temp=0.04)
    torch.testing.assert_close(self_distillation(SCORES[:views], TEACHER, CENTRE, 0.1, 0.04), theirs)


def test_self_distillation_follows_the_formula() -> None:
    terms = []
    for view in range(2):
        sharp = ((TEACHER[view] - CENTRE) / 0.5).exp()
        assignments = sharp / sharp.sum(1, keepdim=True)
        terms += [cross_entropy(assignments, SCORES[other] / 0.1) for other in range(4) if other != view]
    torch.testing.assert_close(self_distillation(SCORES, TEACHER, CENTRE, 0.1, 0.5), torch.stack(terms).mean())


def test_gradients_of_self_distillation() -> None:
    student, teacher = SCORES.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: self_distillation(x, TEACHER, CENTRE, 0.1, 0.5), (student,))
    loss = self_distillation(student, teacher, CENTRE, 0.1, 0.5)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_half_precision_and_autocast_do_not_reach_inside() -> None:
    embeddings, prototypes = random(4, 7, 3).bfloat16(), PROTOTYPES.float()
    outside = cosines(embeddings.float(), prototypes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosines(embeddings, prototypes)
        losses = (
            swapped_prediction(inside, 0.1, 0.05, 3),
            self_distillation(inside, inside[:2], inside[0, 0], 0.1, 0.04),
        )
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    torch.testing.assert_close(losses[0], swapped_prediction(outside, 0.1, 0.05, 3), rtol=0, atol=0)
    expected = self_distillation(outside, outside[:2], outside[0, 0], 0.1, 0.04)
    torch.testing.assert_close(losses[1], expected, rtol=0, atol=0)
