"""What is special to the upper reference: labels, images without them, and the mean over all ranks' labelled images."""

import pytest
import torch
import torch.nn.functional as F
from support.ranks import Ranks
from support.tiny import composed
from support.toys import make_method, make_views
from torch import Tensor

from icl_msr.cli.assemble import require_meaning
from icl_msr.core.config import check
from icl_msr.core.distributed import rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.methods import Step
from icl_msr.methods.supervised import labelled_cross_entropy

STEP = Step(0, 10)
LABELS = torch.tensor([0, -1, 2, 1, -1, -1, -1, 2])  # three and one of the halves; the last two quarters have 0 and 1


def logits() -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_cross_entropy_by_hand() -> None:
    rows, total = logits(), 0.0
    for row, label in zip(rows, LABELS.tolist(), strict=True):
        if label >= 0:
            total -= float((row[label].exp() / row.exp().sum()).log())
    assert float(labelled_cross_entropy(rows, LABELS)) == pytest.approx(total / 4, rel=1e-12)
    torch.testing.assert_close(labelled_cross_entropy(rows, LABELS), F.cross_entropy(rows, LABELS, ignore_index=-1))
    assert torch.autograd.gradcheck(lambda x: labelled_cross_entropy(x, LABELS), rows.requires_grad_())


def test_a_batch_without_labels_teaches_nothing() -> None:
    rows = logits().requires_grad_()
    loss = labelled_cross_entropy(rows, torch.full((8,), -1))
    (gradient,) = torch.autograd.grad(loss, rows)
    assert loss == 0
    assert not gradient.any()


def on_this_rank() -> tuple[Tensor, Tensor]:
    rows, labels = (t.chunk(world_size())[rank()].clone() for t in (logits(), LABELS))
    rows.requires_grad_()
    loss = labelled_cross_entropy(rows, labels)
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


def test_ranks_with_different_numbers_of_labels_equal_one_process(ranks: Ranks) -> None:
    loss, gradient = on_this_rank()
    losses, gradients = zip(*ranks(on_this_rank), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(torch.cat(gradients) / ranks.size, gradient)


def test_every_view_is_classified() -> None:
    method, views = make_method("supervised").eval(), make_views()
    views.labels = torch.tensor([0, 1, -1, 2, -1, 0])
    losses = []
    for chosen in (views.views, views.views[:1], views.views[1:]):
        some = make_views()
        some.views, some.labels = chosen, views.labels
        losses.append(method(some, method.targets(some), STEP).loss)
    both, first, second = losses
    torch.testing.assert_close(both, (first + second) / 2)
    assert first != second


@pytest.mark.parametrize("name", ["supervised", "random"])
@pytest.mark.parametrize("words", [("regularizer=msr",), ("regularizer=none", "negatives=patch")])
def test_what_has_no_meaning_is_refused(name: str, words: tuple[str, ...]) -> None:
    method = make_method(name)
    group, _, _ = words[-1].partition("=")
    with pytest.raises(UserError, match=rf"^{group}: .*; add {group}=none, or choose another method\.$"):
        require_meaning(check(composed(f"method={name}", *words)), method, 1)
    require_meaning(check(composed(f"method={name}", "regularizer=none", "augment=multicrop")), method, 1)
