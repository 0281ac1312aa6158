"""The bi-level step against difference quotients of the whole objective, and the identities of the regularizer."""

import copy
import math
from typing import Any

import pytest
import torch
from support.toys import METHODS, make_method, make_regularizer, make_views, skip_refused
from torch import Tensor
from torch.func import functional_call

from icl_msr.core.errors import UserError
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import unit
from icl_msr.methods import Method, Step
from icl_msr.methods.base import Pair
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.regularizers.bilevel import meta_pass, norm, trainable
from icl_msr.regularizers.strata import diversity, random_partition, uniform, uniformity

STEP = Step(0, 10, noise=3)


@pytest.fixture
def method(method: Method) -> Method:
    """Every method that takes a regularizer."""
    skip_refused(method, "regularizer")
    return method


STOP_GRADIENT = {"simsiam", "swav"}
"""Methods that detach a part of what they compare: the gradient that they follow is not that of the loss's value."""


def virtual_step(
    method: Method, regularizer: MetaSemanticRegularizer, views: Views, phi: dict[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """theta' = theta - alpha d/dtheta L_to(theta, phi), from scratch: the meta gradient is that of L_ct(theta')."""
    theta = trainable(method)
    targets = method.targets(views)
    output = method(views, targets, STEP)
    strata = functional_call(regularizer.network, phi, (views.images,))
    total = output.loss + regularizer.lam * regularizer.penalty(output.pairs, strata)
    gradient = torch.autograd.grad(total, list(theta.values()), materialize_grads=True)
    still = {id(p) for p in method.frozen(STEP)}
    return {
        name: (p if id(p) in still else p - alpha * g).detach().requires_grad_()
        for (name, p), g in zip(theta.items(), gradient, strict=True)
    }


@pytest.mark.parametrize("negatives", [0, 2])
def test_forward_mode_equals_double_backward(method: Method, negatives: int) -> None:
    views = make_views(negatives=negatives)
    both = []
    for mode in ("exact", "double_backward"):
        regularizer = make_regularizer(method, mode=mode)
        with meta_pass(method, views.images.device):
            targets = method.targets(views)
            inner = regularizer.inner_gradient(method, views, targets, STEP)
            signal = regularizer.meta_gradient(method, views, targets, STEP, inner, 0.1)
        both.append(torch.cat([s.flatten() for s in signal]))
    forward, double = both
    assert (forward - double).abs().max() <= 1e-9 * double.abs().max()


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("name", list(METHODS))
def test_meta_gradient_is_the_derivative_of_the_bilevel_objective(name: str, negatives: int) -> None:
    method, views = make_method(name), make_views(negatives=negatives)
    skip_refused(method, "regularizer")
    regularizer = make_regularizer(method)
    network = regularizer.network
    assert network is not None
    with meta_pass(method, views.images.device):
        targets = method.targets(views)
        inner = regularizer.inner_gradient(method, views, targets, STEP)
        alpha = regularizer.step_size(method, inner, 0.0)
        meta = regularizer.meta_gradient(method, views, targets, STEP, inner, alpha)
        torch.manual_seed(5)
        direction = [torch.randn_like(p) for p in network.parameters()]
        direction = [d / norm(direction) for d in direction]
        phi = {n: p.detach() for n, p in network.named_parameters()}

        def outer_loss(after: dict[str, Tensor]) -> Tensor:
            return functional_call(method, after, (views, targets, STEP)).loss

        start = virtual_step(method, regularizer, views, phi, alpha)
        v = torch.autograd.grad(outer_loss(start), list(start.values()), materialize_grads=True)

        def along(t: float) -> float:
            moved = {n: p + t * d for (n, p), d in zip(phi.items(), direction, strict=True)}
            after = virtual_step(method, regularizer, views, moved, alpha)
            if name in STOP_GRADIENT:
                return float(sum((g * p).sum() for g, p in zip(v, after.values(), strict=True)))
            return float(outer_loss(after))

        def central(h: float) -> float:
            return (along(h) - along(-h)) / (2 * h)

        h = 2e-3
        richardson = (64 * central(h / 4) - 20 * central(h / 2) + central(h)) / 45
    exact = float(sum((m * d).sum() for m, d in zip(meta, direction, strict=True)))
    assert exact != 0
    assert abs(exact - richardson) <= 1e-5 * abs(richardson)


def meta_gradient(method: Method, views: Views, relative_step: float = 0.05, **keys: Any) -> Tensor:
    """As one vector, from a regularizer that differs from the others in `keys` alone."""
    regularizer = make_regularizer(method, relative_step=relative_step, **keys)
    with meta_pass(method, views.images.device):
        targets = method.targets(views)
        inner = regularizer.inner_gradient(method, views, targets, STEP)
        alpha = regularizer.step_size(method, inner, 0.0)
        return torch.cat([g.flatten() for g in regularizer.meta_gradient(method, views, targets, STEP, inner, alpha)])


def test_difference_converges_to_the_exact_gradient(method: Method) -> None:
    """Error of first order in h on a smooth net."""
    views = make_views()
    exact = meta_gradient(method, views)
    errors = [
        float((meta_gradient(method, views, mode="difference", difference_step=h) - exact).abs().max())
        for h in (1e-4, 1e-5)
    ]
    assert errors[1] < 2e-3 * exact.abs().max()
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)


@pytest.mark.parametrize("mode", ["exact", "difference"])
@pytest.mark.parametrize("scope", ["last_stage", "projector"])
def test_a_narrow_scope_is_double_backward_of_the_same_parameters(method: Method, scope: str, mode: str) -> None:
    views = make_views(negatives=1)
    found = meta_gradient(method, views, scope=scope, mode=mode, difference_step=1e-7)
    oracle = meta_gradient(method, views, scope=scope, mode="double_backward")
    tolerance = 1e-9 if mode == "exact" or scope == "projector" else 1e-4
    assert (found - oracle).abs().max() <= tolerance * oracle.abs().max()


@pytest.mark.parametrize("name", ["simclr", "moco", "byol", "swav"])
def test_near_free_is_exact_in_the_limit_of_small_steps(name: str) -> None:
    """With a small lambda the ordinary gradient is that of L_ct, and theta' is theta."""
    method, views = make_method(name), make_views()
    exact, near_free = (
        meta_gradient(method, views, mode=mode, lam=1e-6, relative_step=1e-7) for mode in ("exact", "near_free")
    )
    assert exact @ near_free / (exact.norm() * near_free.norm()) > 1 - 1e-6
    assert near_free.norm() == pytest.approx(float(exact.norm()), rel=1e-3)


def test_features_of_the_ordinary_step_change_nothing(method: Method) -> None:
    views = make_views(negatives=1)
    targets = method.targets(views)
    features = method(views, targets, STEP).features
    for keys in ({"mode": "difference"}, {"mode": "exact", "scope": "projector"}):
        regularizer = make_regularizer(method, **keys)
        with meta_pass(method, views.images.device):
            inner = regularizer.inner_gradient(method, views, targets, STEP)
            given, found = (
                regularizer.meta_gradient(method, views, targets, STEP, inner, 0.1, z) for z in (features, None)
            )
        for a, b in zip(given, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_a_head_with_batch_norm_of_torch_is_refused() -> None:
    """Its tangent takes the batch statistics for constants, which makes the gradient of the tangent wrong."""
    method, views = make_method("simclr"), make_views()
    assert isinstance(method.projector, torch.nn.Sequential)
    method.projector[1] = torch.nn.BatchNorm1d(12).double()
    regularizer, targets = make_regularizer(method), method.targets(views)
    with pytest.raises(UserError, match=r"projector\.1 is a BatchNorm1d.*global_batch_norm"):
        regularizer.meta_step(method, views, targets, STEP, None, 0.1)
    global_batch_norm(method.projector)
    regularizer.meta_step(method, views, targets, STEP, None, 0.1)


def test_half_precision_is_refused() -> None:
    method, views = make_method("simclr", dtype=torch.bfloat16), make_views()
    with pytest.raises(UserError, match="full precision"):
        make_regularizer(method).meta_step(
            method, views, method.targets(make_views(dtype=torch.bfloat16)), STEP, None, 0
        )


@pytest.mark.parametrize("mode", ["exact", "difference", "double_backward"])
def test_compiled_networks_are_run_eagerly(mode: str) -> None:
    views = make_views()
    plain, compiled = make_method("simclr"), make_method("simclr")
    compiled.backbone.net.compile(backend="aot_eager")
    eager = meta_gradient(plain, views, mode=mode)
    torch.testing.assert_close(meta_gradient(compiled, views, mode=mode), eager, rtol=1e-6, atol=1e-12)


def test_what_is_frozen_does_not_take_the_virtual_step() -> None:
    method, views = make_method("swav", freeze_epochs=1.0), make_views()
    inner = make_regularizer(method).inner_gradient(method, views, method.targets(views), STEP)
    assert not inner["prototypes"].any()
    later = Step(9, 10, epochs=10)
    assert make_regularizer(method).inner_gradient(method, views, method.targets(views), later)["prototypes"].any()


def test_uniform_strata_are_the_identity(method: Method) -> None:
    views = make_views()
    output = method(views, method.targets(views), STEP)
    pair = output.pairs[0]
    c = method.channels
    strata = uniform(c).double().expand(6, 1, c)
    reweighted = math.sqrt(c) * strata[:, 0] * pair.key_features
    torch.testing.assert_close(pair.head(reweighted), pair.head(pair.key_features))


@pytest.mark.parametrize("denominators", ["printed", "all"])
@torch.no_grad()
def test_penalty_follows_the_printed_formula(denominators: str) -> None:
    method, views = make_method("simclr", temperature=0.5), make_views()
    regularizer = make_regularizer(method, denominators=denominators)
    pairs = method(views, method.targets(views), STEP).pairs
    strata = regularizer.strata(views.images)
    total, tau, n = 0.0, 0.5, len(views.index)
    for j, pair in enumerate(pairs):
        # A head with BatchNorm sees all n N rows at once, so the loop below must as well.
        rows = torch.stack([math.sqrt(8) * strata[:, t] * pair.key_features for t in range(3)], 1).flatten(0, 1)
        heads = list(unit(pair.head(rows)).unflatten(0, (n, 3)).unbind(1))
        for i in range(n):
            anchor = unit(pair.anchor)[i]
            others = [unit(pair.key)[k] for k in range(n) if k != i]
            if denominators == "all":
                others += [unit(pairs[1 - j].key)[k] for k in range(n) if k != i]
            negative = sum(math.exp(float(anchor @ other) / tau) for other in others)
            e = [math.exp(float(anchor @ heads[t][i]) / tau) for t in range(3)]
            total -= math.log(sum(x / (x + negative) for x in e) / 3)
    assert float(regularizer.penalty(pairs, strata)) == pytest.approx(total / (2 * n), rel=1e-10)


def test_ones_makes_the_penalty_a_second_info_nce() -> None:
    method, views = make_method("moco"), make_views()
    output = method(views, method.targets(views), STEP)
    regularizer = make_regularizer(method, weights="ones")
    torch.testing.assert_close(regularizer(views, output, STEP), regularizer.lam * output.loss)


def test_without_negatives_only_the_positive_term_stays() -> None:
    method, views = make_method("byol"), make_views()
    output = method(views, method.targets(views), STEP)
    ones = make_regularizer(method, weights="ones", negatives="none")
    cosines = [(unit(p.anchor) * unit(p.head(p.key_features))).sum(1).mean() for p in output.pairs]
    expected = -torch.stack(cosines).mean() / 0.5
    torch.testing.assert_close(ones(views, output, STEP), ones.lam * expected)


def test_a_frozen_head_passes_the_gradient_to_the_strata() -> None:
    method, views = make_method("moco"), make_views()
    regularizer = make_regularizer(method)
    strata = regularizer.strata(views.images)
    penalty = regularizer.penalty(method(views, method.targets(views), STEP).pairs, strata)
    (gradient,) = torch.autograd.grad(penalty, strata)
    assert gradient.abs().max() > 0


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("weights", ["meta", "uniform_only", "joint"])
def test_meta_step_moves_phi_and_nothing_else(method: Method, weights: str) -> None:
    views = make_views(negatives=1)
    regularizer = make_regularizer(method, weights=weights)
    targets = method.targets(views)
    before, phi, random_state = state(method), state(regularizer), torch.get_rng_state()
    log = regularizer.meta_step(method, views, targets, STEP, None, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert all(m.track_running_stats for m in method.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert any(not torch.equal(value, phi[name]) for name, value in state(regularizer).items())
    assert log["uniformity_grad_norm"] > 0
    assert ("meta_grad_norm" in log) == (weights != "uniform_only")


def test_uniformity_alone_would_blind_the_trunk() -> None:
    """Any one partition of the channels is an optimum, whatever the image; the head can learn it without the trunk."""
    method, images = make_method("simclr"), make_views(n=16, size=16)
    targets, variation = method.targets(images), {}
    for part in ("head", "all"):
        regularizer = make_regularizer(method, weights="uniform_only", uniformity_trains=part, lr=1e-3)
        assert regularizer.network is not None
        trunk = state(regularizer.network.trunk)
        for _ in range(40):
            regularizer.meta_step(method, images, targets, STEP, None, 0.1)
        moved = [not torch.equal(value, trunk[name]) for name, value in state(regularizer.network.trunk).items()]
        assert any(moved) == (part == "all")
        variation[part] = float(diversity(regularizer.strata(images.images))["variation"])
    assert variation["head"] > 10 * variation["all"]


def test_a_frozen_trunk_keeps_seeing_the_image() -> None:
    method, views = make_method("simclr"), make_views()
    variation = {}
    for name, keys in {"default": {}, "per image": {"trunk": "frozen", "head_scale": 8.0}}.items():
        regularizer = make_regularizer(method, lr=1e-2, **keys)
        network = regularizer.network
        assert network is not None
        trunk = copy.deepcopy(network.trunk.state_dict())
        for _ in range(40):
            regularizer.meta_step(method, views, method.targets(views), STEP, None, 0.1)
        moved = any(not torch.equal(trunk[key], value) for key, value in network.trunk.state_dict().items())
        assert moved == (name == "default")
        variation[name] = float(diversity(regularizer.strata(views.images))["variation"])
    assert variation["per image"] > 10 * variation["default"]


def test_only_v_is_computed_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run of mixed precision: near the exact gradient, and nothing else sees an autocast context."""
    method, views = make_method("simclr", dtype=torch.float32), make_views(n=16, dtype=torch.float32)
    regularizer = make_regularizer(method, mode="exact").float()
    seen = []
    project = type(method).project

    def spy(self: Method, features: list[Tensor]) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return project(self, features)

    monkeypatch.setattr(type(method), "project", spy)
    found = {}
    with meta_pass(method, views.images.device):
        targets = method.targets(views)
        inner = regularizer.inner_gradient(method, views, targets, STEP)
        for precision in (None, torch.bfloat16):
            seen.clear()
            signal = regularizer.meta_gradient(method, views, targets, STEP, inner, 0.1, precision=precision)
            found[precision] = torch.cat([s.flatten() for s in signal])
            assert seen[0] == (precision is not None)
            assert not any(seen[1:])
    assert not torch.equal(*found.values())
    assert torch.cosine_similarity(*found.values(), dim=0) > 0.98


@pytest.mark.parametrize("weights", ["random", "random_net", "ones"])
def test_fixed_controls_have_nothing_to_train(weights: str) -> None:
    regularizer = make_regularizer(make_method("simclr"), weights=weights)
    assert not regularizer.due(STEP)
    assert not any(p.requires_grad for p in regularizer.parameters())


def test_controls_differ_in_nothing_but_phi() -> None:
    method, views = make_method("simclr"), make_views()
    random_net = make_regularizer(method, weights="random_net")
    meta = make_regularizer(method, weights="meta")
    output = method(views, method.targets(views), STEP)
    assert torch.equal(meta(views, output, STEP), random_net(views, output, STEP))


def test_random_partition_is_an_optimum_of_the_uniformity_loss() -> None:
    partition = random_partition(12, 3, seed=4)
    assert torch.equal((partition > 0).sum(0), torch.ones(12, dtype=torch.long))
    torch.testing.assert_close(partition.norm(dim=1), torch.ones(3))
    best = uniformity(partition[None], u=2.0)
    torch.testing.assert_close(best, torch.tensor(3 + 6 * math.exp(-4)).log())
    others = torch.nn.functional.normalize(torch.rand(50, 3, 12), dim=-1)
    assert (uniformity(others[:, None].flatten(0, 1), u=2.0) > best).all()


def test_strata_have_unit_length_and_depend_on_their_own_image_alone() -> None:
    regularizer = make_regularizer(make_method("simclr"))
    images = make_views(n=5, size=16).images
    strata = regularizer.strata(images)
    assert strata.shape == (5, 3, 8)
    assert (strata >= 0).all()
    torch.testing.assert_close(strata.norm(dim=-1), torch.ones(5, 3, dtype=torch.float64))
    torch.testing.assert_close(regularizer.strata(images[2:3]), strata[2:3])


def test_the_optimiser_of_phi_travels_in_the_state_dict() -> None:
    method, views = make_method("simclr"), make_views()
    first = make_regularizer(method)
    targets = method.targets(views)
    first.meta_step(method, views, targets, STEP, None, 0.1)
    second = make_regularizer(method)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for regularizer in (first, second):
        regularizer.meta_step(method, views, targets, STEP, None, 0.1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ordinary_gradient_is_the_inner_gradient(method: Method) -> None:
    """What training leaves in .grad is what the virtual step would compute by itself."""
    views = make_views()
    regularizer = make_regularizer(method)
    targets = method.targets(views)
    inner = regularizer.inner_gradient(method, views, targets, STEP)
    output = method(views, targets, STEP)
    (output.loss + regularizer(views, output, STEP)).backward()
    still = {id(p) for p in method.frozen(STEP)}
    for name, parameter in trainable(method).items():
        assert parameter.grad is not None
        expected = torch.zeros_like(parameter) if id(parameter) in still else parameter.grad
        torch.testing.assert_close(inner[name], expected)


def test_pairs_say_what_the_loss_compares(method: Method) -> None:
    views = make_views()
    pair: Pair
    for pair in method(views, method.targets(views), STEP).pairs:
        torch.testing.assert_close(pair.anchor.shape, pair.key.shape)
