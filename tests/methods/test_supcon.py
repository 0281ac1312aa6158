"""The supervised contrastive loss and SimCLR with more than two views, against loops; ranks are one process."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.ranks import Ranks
from support.toys import make_method, make_views
from torch import Tensor

from icl_msr.core.distributed import rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.views import NonSemantic, Views
from icl_msr.losses.contrastive import nt_xent, supervised_contrastive
from icl_msr.methods import Step

STEP = Step(0, 10)
LABELS = torch.tensor([0, 2, 0, -1, 1, 0, -1, 2])
TAU = 0.3


def rows(views: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(views, 8, 5, generator=generator, dtype=torch.float64))


def by_hand(views: list[Tensor], extra: NonSemantic | None) -> Tensor:
    """Eq. 2 with loops: the mean over anchors of -1/|P| sum_p log exp(z.z_p / tau) / sum_a exp(z.z_a / tau)."""
    unit = [[z / z.norm() for z in view] for view in views]
    places = list(itertools.product(range(len(views)), range(8)))
    total = torch.zeros((), dtype=torch.float64)
    for v, i in places:
        others = [(w, j) for w, j in places if (w, j) != (v, i)]
        below = torch.stack([torch.exp(unit[v][i] @ unit[w][j] / TAU) for w, j in others]).sum()
        if extra is not None:
            for t in extra.rows[i]:
                below = below + torch.exp(extra.alpha * (unit[v][i] @ (t / t.norm())) / TAU)
        same = [(w, j) for w, j in others if j == i or LABELS[i] == LABELS[j] >= 0]
        for w, j in same:
            total = total - torch.log(torch.exp(unit[v][i] @ unit[w][j] / TAU) / below) / len(same) / len(places)
    return total


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("negatives", [0, 2])
def test_the_loss_by_hand(views: int, negatives: int) -> None:
    extra = None
    if negatives:
        made = torch.randn(8, negatives, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        extra = NonSemantic(made, alpha=2.0, repulsion=0.0)
    found = supervised_contrastive(rows(views), LABELS, 3, TAU, extra)
    torch.testing.assert_close(found, by_hand(rows(views), extra), rtol=1e-12, atol=0)


def test_its_gradient() -> None:
    views = [view.requires_grad_() for view in rows(2)]
    assert torch.autograd.gradcheck(lambda a, b: supervised_contrastive([a, b], LABELS, 3, TAU), views)


def test_without_labels_it_is_nt_xent() -> None:
    first, second = rows(2)
    unlabelled = torch.full((8,), -1)
    torch.testing.assert_close(
        supervised_contrastive([first, second], unlabelled, 3, TAU), nt_xent(first, second, TAU), rtol=1e-12, atol=0
    )


def on_this_rank() -> tuple[Tensor, Tensor]:
    views = [view.chunk(world_size())[rank()].clone().requires_grad_() for view in rows(3)]
    loss = supervised_contrastive(views, LABELS.chunk(world_size())[rank()], 3, TAU)
    return loss.detach(), torch.stack(torch.autograd.grad(loss, views), dim=1)


def test_ranks_are_one_process(ranks: Ranks) -> None:
    loss, gradient = on_this_rank()
    losses, gradients = zip(*ranks(on_this_rank), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(torch.cat(gradients) / ranks.size, gradient)


def four_views() -> Views:
    views = make_views(negatives=1)
    return replace(views, views=[*views.views, *make_views(seed=1).views])


def test_simclr_with_four_views_is_the_mean_over_six_pairs() -> None:
    method, views = make_method("simclr"), four_views()
    targets = method.targets(views)
    output = method(views, targets, STEP)
    pairs = list(itertools.combinations(output.embeddings, 2))
    losses = [nt_xent(*pair, method.temperature or 0, targets.negatives) for pair in pairs]
    assert len(losses) == 6
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    assert len(output.pairs) == 2  # a regularizer compares the first two views


def test_supcon_takes_four_views_and_their_labels() -> None:
    method, views = make_method("supcon"), four_views()
    targets = method.targets(views)
    output = method(views, targets, STEP)
    expected = supervised_contrastive(output.embeddings, views.labels, 3, method.temperature or 0, targets.negatives)
    torch.testing.assert_close(output.loss, expected)


def test_data_without_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"method=supcon learns to tell classes apart, .* has no classes"):
        make_method("supcon", classes=0)
