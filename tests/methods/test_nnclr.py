"""What is special to NNCLR: the support set and the neighbours that it gives."""

import torch
import torch.nn.functional as F
from support.toys import make_method, make_views
from torch import Tensor

from icl_msr.core.views import NonSemantic
from icl_msr.losses.contrastive import unit
from icl_msr.methods import NNCLR, Step

STEP = Step(0, 10)


def test_loss_is_that_of_the_papers_pseudocode() -> None:
    method, views = make_method("nnclr"), make_views()
    assert isinstance(method, NNCLR)
    output = method(views, method.targets(views), STEP)
    p1, p2, z1, z2 = output.embeddings

    def slow(z: Tensor, p: Tensor) -> Tensor:
        nearest = [max(method.support.keys, key=lambda row: float(row @ query)) for query in z.detach()]
        return F.cross_entropy(unit(torch.stack(nearest)) @ unit(p).T / method.temperature, torch.arange(len(p)))

    torch.testing.assert_close(output.loss, (slow(z1, p2) + slow(z2, p1)) / 2)


def test_the_first_views_projections_enter_the_support_set() -> None:
    method, views = make_method("nnclr"), make_views()
    assert isinstance(method, NNCLR)
    targets = method.targets(views)
    embeddings = method(views, targets, STEP).embeddings
    predictions, projections = embeddings[:2], embeddings[2:]
    torch.testing.assert_close(predictions[0], method.predictor(torch.cat(projections)).chunk(2)[0])
    method.observe(targets, [e.detach() for e in embeddings])
    torch.testing.assert_close(method.support.keys[:6], unit(projections[0].detach()))
    assert int(method.support.position) == 6


def test_non_semantic_negatives_push_the_prediction_away() -> None:
    """A neighbour has no gradient, so the repulsion has to reach the predictions."""
    method, views = make_method("nnclr"), make_views(negatives=1)
    targets = method.targets(views)
    embeddings = [e.detach().requires_grad_() for e in method.project(method.encode(views))]
    near = embeddings[0].detach() + 0.1 * torch.randn_like(embeddings[0])
    targets.negatives = NonSemantic(near[:, None], alpha=100.0, repulsion=0.0)  # outweighs everything else
    (gradient,) = torch.autograd.grad(method.loss(embeddings, targets, STEP), embeddings[0])
    (towards,) = torch.autograd.grad(F.cosine_similarity(embeddings[0], near, dim=1).sum(), embeddings[0])
    assert ((gradient * towards).sum(1) > 0).all()
