"""The stop-gradient, in the loss and in what MSR sees of it."""

import torch
from lightly.loss import NegativeCosineSimilarity
from support.toys import make_method, make_regularizer, make_views

from icl_msr.methods import Step
from icl_msr.methods.simsiam import StopGradient

STEP = Step(0, 10)


def test_the_loss_is_the_papers() -> None:
    method, views = make_method("simsiam"), make_views()
    output = method(views, method.targets(views), STEP)
    first, second, key_first, key_second = output.embeddings
    similarity = NegativeCosineSimilarity()
    theirs = (similarity(first, key_second.detach()) + similarity(second, key_first.detach())) / 2
    torch.testing.assert_close(output.loss, 2 + 2 * theirs)
    theta = list(method.parameters())
    expected = torch.autograd.grad(2 * theirs, theta, retain_graph=True)
    for found, gradient in zip(torch.autograd.grad(output.loss, theta), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_no_gradient_reaches_the_projections() -> None:
    method, views = make_method("simsiam"), make_views()
    output = method(views, method.targets(views), STEP)
    regularizer = make_regularizer(method)
    both = output.loss + regularizer(views, output, STEP)
    gradients = torch.autograd.grad(both, output.embeddings, allow_unused=True, retain_graph=True)
    assert [g is None for g in gradients] == [False, False, True, True]
    assert all(not pair.key.requires_grad and not pair.key_features.requires_grad for pair in output.pairs)


def test_a_stopped_head_is_the_head_and_passes_the_gradient_to_its_input_alone() -> None:
    method = make_method("simsiam").eval()
    features = make_views().images.flatten(1)[:, :8].requires_grad_()
    stopped = StopGradient(method.projector)(features)
    plain = method.projector(features)
    torch.testing.assert_close(stopped, plain)
    expected = torch.autograd.grad(plain.sin().sum(), features)
    torch.testing.assert_close(torch.autograd.grad(stopped.sin().sum(), features, retain_graph=True), expected)
    stopped.sin().sum().backward()
    assert all(p.grad is None for p in method.projector.parameters())


def test_negatives_are_repelled_from_the_predictions() -> None:
    method, views = make_method("simsiam"), make_views(negatives=2)
    targets = method.targets(views)
    assert targets.negatives is not None
    with_negatives = method(views, targets, STEP)
    targets.negatives.repulsion = 0.0
    unit = torch.nn.functional.normalize
    negatives = unit(targets.negatives.rows, dim=-1)
    squared = [(unit(p)[:, None] - negatives).square().sum(-1).mean() for p in with_negatives.embeddings[:2]]
    torch.testing.assert_close(
        with_negatives.loss, method(views, targets, STEP).loss - 0.25 * (squared[0] + squared[1]) / 2
    )
