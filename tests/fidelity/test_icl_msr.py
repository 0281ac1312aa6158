"""ICL-MSR against its text: the losses, and both stages of Algorithm 1 over two epochs."""

import copy

import pytest
import torch
from support import naive
from support.naive import Close
from support.toys import make_method, make_regularizer, make_views
from torch import Tensor
from torch.func import functional_call

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import nt_xent
from icl_msr.methods import Method, Step
from icl_msr.methods.base import Pair
from icl_msr.regularizers.base import Pass
from icl_msr.regularizers.strata import uniformity

LETTER = {"reduction": "sum", "alpha": "lr", "schedule": "per_epoch", "uniformity_trains": "all"}
"""The keys of `regularizer=msr_paper`, but for the mode."""


def embeddings(method: Method, theta: dict[str, Tensor], views: Views) -> tuple[list[Tensor], list[Tensor]]:
    """Features Z and h(Z) of both views at theta, each head in the batch that the method gives it."""
    parts = {name.removeprefix("backbone."): p for name, p in theta.items() if name.startswith("backbone.")}
    features = functional_call(method.backbone, parts, (torch.cat(views.views),)).chunk(2)
    return list(features), list(project(method, theta, torch.cat(list(features))).chunk(2))


def project(method: Method, theta: dict[str, Tensor], features: Tensor) -> Tensor:
    """h of features (N, c)."""
    parts = {name.removeprefix("projector."): p for name, p in theta.items() if name.startswith("projector.")}
    projected: Tensor = functional_call(method.projector, parts, (features,))
    return projected


def moved(method: Method, theta: dict[str, Tensor], features: Tensor, strata: Tensor) -> list[list[Tensor]]:
    """h(sqrt(c) a_t * Z_i) of each image and stratum. BatchNorm sees all of them as one batch."""
    rows = [features.shape[1] ** 0.5 * a * z for z, image in zip(features, strata, strict=True) for a in image]
    found = list(project(method, theta, torch.stack(rows)))
    return [found[i : i + strata.shape[1]] for i in range(0, len(found), strata.shape[1])]


@pytest.mark.parametrize("denominators", ["printed", "all"])
def test_losses(denominators: str, close: Close) -> None:
    method, views = make_method("simclr", temperature=0.3), make_views(5)
    regularizer = make_regularizer(method, denominators=denominators)
    strata = regularizer.strata(views.images)
    theta = dict(method.named_parameters())
    features, projected = embeddings(method, theta, views)
    reweighted = [moved(method, theta, z, strata) for z in features]
    pairs = method(views, method.targets(views), Step(0, 1)).pairs
    expected = naive.msr(projected, reweighted, 0.3, denominators) / 10
    close(f"L_msr, {denominators}", regularizer.penalty(pairs, strata), expected, 1e-12)
    close("L_ct of SimCLR", nt_xent(*projected, 0.3), naive.contrastive(projected, 0.3) / 10, 1e-12)
    each = torch.stack([naive.uniformity(a, 2.0) for a in strata])
    close("L_uni", uniformity(strata, 2.0), each.mean(), 1e-12)


def test_the_bank_of_a_method(close: Close) -> None:
    """With MoCo's queue the denominators hold the queue."""
    method, views = make_method("moco"), make_views(4)
    regularizer = make_regularizer(method, temperature=0.3)
    strata = regularizer.strata(views.images)
    (pair,) = method(views, method.targets(views), Step(0, 1)).pairs
    assert isinstance(pair, Pair)
    assert pair.bank is not None
    rows = torch.stack([len(a[0]) ** 0.5 * s * z for z, a in zip(pair.key_features, strata, strict=True) for s in a])
    heads = pair.head(rows).reshape(4, 3, -1)
    total = torch.zeros((), dtype=torch.float64)
    for anchor, positives in zip(pair.anchor, heads, strict=True):
        negative = torch.stack([torch.exp(naive.sim(anchor, key) / 0.3) for key in pair.bank]).sum()
        e = [torch.exp(naive.sim(anchor, z) / 0.3) for z in positives]
        total = total - torch.log(torch.stack([x / (x + negative) for x in e]).mean())
    close("L_msr, MoCo's queue", regularizer.penalty([pair], strata), total / 4, 1e-12)


@pytest.mark.parametrize("mode", ["exact", "double_backward", "difference"])
def test_algorithm_1(mode: str, close: Close) -> None:
    """Two epochs of three batches. Stage 1 takes the mean, which Adam does not tell from the sum."""
    tau, lam, gamma, u, rate = 0.5, 0.7, 0.3, 2.0, 1e-2
    epochs = [[make_views(4, seed=10 * epoch + b) for b in range(3)] for epoch in (0, 1)]
    method = make_method("simclr", temperature=tau)
    regularizer = make_regularizer(method, mode=mode, lam=lam, gamma=gamma, u=u, **LETTER)
    assert regularizer.network is not None
    copied, network = copy.deepcopy(method), copy.deepcopy(regularizer.network)

    optimizer = torch.optim.Adam(method.parameters(), rate)
    for batches in epochs:
        for index, views in enumerate(batches):
            output = method(views, method.targets(views), Step(index, 6))
            optimizer.zero_grad()
            (output.loss + regularizer(views, output, Step(index, 6))).backward()
            optimizer.step()
        again = [Pass(method, views, method.targets(views), Step(i, 6), rate) for i, views in enumerate(batches)]
        regularizer.after_epoch(again)

    theta_step = torch.optim.Adam(copied.parameters(), rate)
    phi_step = torch.optim.Adam(network.parameters(), 1e-2)
    for batches in epochs:
        for views in batches:  # stage 1, phi fixed
            theta_step.zero_grad()
            (
                total_loss(copied, dict(copied.named_parameters()), views, network(views.images).detach(), lam) / 8
            ).backward()
            theta_step.step()
        for views in batches:  # stage 2, theta fixed
            strata = network(views.images)
            theta = dict(copied.named_parameters())
            total = total_loss(copied, theta, views, strata, lam)
            slopes = torch.autograd.grad(total, list(theta.values()), create_graph=True, materialize_grads=True)
            virtual = {name: p - rate * g for (name, p), g in zip(theta.items(), slopes, strict=True)}
            outer = naive.contrastive(embeddings(copied, virtual, views)[1], tau)
            spread = torch.stack([naive.uniformity(a, u) for a in strata]).mean()
            phi_step.zero_grad()
            phi = list(network.parameters())
            for p, g in zip(phi, torch.autograd.grad(outer + gamma * spread, phi), strict=True):
                p.grad = g
            phi_step.step()

    tolerance = 1e-3 if mode == "difference" else 1e-6  # Adam divides by gradients that may be small
    close(f"Algorithm 1, theta, {mode}", vector(method), vector(copied), tolerance)
    close(f"Algorithm 1, phi, {mode}", vector(regularizer.network), vector(network), tolerance)


def total_loss(method: Method, theta: dict[str, Tensor], views: Views, strata: Tensor, lam: float) -> Tensor:
    """L_to = L_ct + lambda L_msr, both summed over the anchors."""
    features, projected = embeddings(method, theta, views)
    reweighted = [moved(method, theta, z, strata) for z in features]
    return naive.contrastive(projected, 0.5) + lam * naive.msr(projected, reweighted, 0.5, "printed")


def vector(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
