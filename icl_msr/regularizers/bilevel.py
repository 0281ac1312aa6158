"""The bi-level step of any method: d/dphi L_ct(theta - alpha d/dtheta L_to(theta, phi)).

phi enters L_to only through a penalty on the method's pairs, weighted by lambda. L_ct does not depend on phi. So with
v = grad L_ct(theta') the gradient is the pure mixed second derivative

    -alpha lambda d/dphi [ D_theta penalty(theta, phi) [v] ]

of a derivative along one direction. `outer_gradient` computes v. `along_*` computes the derivative along v as a
function of phi, and the caller differentiates it once more. phi acts after the backbone, so the features Z and their
change D Z[v] are constants to it. Only the heads are differentiated backwards, and no pass through the backbone keeps a
graph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from icl_msr.core.distributed import average
from icl_msr.core.views import Views
from icl_msr.methods.base import Method, Output, Pair, Step, Targets
from icl_msr.models.batchnorm import frozen_statistics

Gradients = dict[str, Tensor]
Features = Sequence[Tensor]
Scope = Literal["all", "last_stage", "projector"]
Penalty = Callable[[list[Pair]], Tensor]


def trainable(module: nn.Module) -> Gradients:
    """Return theta: the parameters that the ordinary optimiser trains, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def scoped(method: Method, scope: Scope) -> Gradients:
    """Return the part of theta that the virtual step moves: all of it, or the heads with or without the last stage."""
    theta = trainable(method)
    if scope == "all":
        return theta
    still = {id(p) for p in method.backbone.parameters()}
    if scope == "last_stage":
        still -= {id(p) for p in method.backbone.last_stage()}
    return {name: p for name, p in theta.items() if id(p) not in still}


def norm(tensors: Any) -> Tensor:
    """Return the Euclidean norm () of many tensors taken as one vector.

    It is float64 on their device, so that the host does not wait.
    """
    length: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([t.detach() for t in tensors])))
    return length.double()


def gradients(loss: Tensor, theta: Mapping[str, Tensor]) -> Gradients:
    """Return the gradient of the mean of all ranks' losses, by name. It is zero for parameters without influence."""
    values = average(torch.autograd.grad(loss, list(theta.values()), materialize_grads=True))
    return dict(zip(theta, values, strict=True))


def ordinary_gradient(method: Method) -> Gradients:
    """Return the gradient in `.grad` after an ordinary backward pass, by name: `inner` of `meta_step`.

    It is zero for parameters without a gradient.
    """
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(method).items()}


def replay(
    method: Method, views: Views, targets: Targets, step: Step, theta: Mapping[str, Tensor] | None = None
) -> Output:
    """Repeat the ordinary forward pass with the same random masks, at theta or at the method's own parameters."""
    torch.manual_seed(step.noise)
    if theta is None:
        output: Output = method(views, targets, step)
    else:
        output = functional_call(method, dict(theta), (views, targets, step))
    return output


def encode(method: Method, views: Views, step: Step, theta: Mapping[str, Tensor]) -> list[Tensor]:
    """Return features Z (N, c) of each view at theta, with the same random masks."""
    torch.manual_seed(step.noise)
    features: list[Tensor] = _call(method, theta, lambda m: m.encode(views))
    return features


def outer_gradient(
    method: Method,
    views: Views,
    targets: Targets,
    step: Step,
    virtual: Mapping[str, Tensor],
    features: Features | None = None,
    precision: torch.dtype | None = None,
) -> Gradients:
    """Return v = grad L_ct at theta' with respect to the parameters in `virtual`, by name.

    Args:
        method, views, targets, step: inputs of the ordinary step.
        virtual: the parameters theta' that the virtual step moved, by name. The others stay at theta.
        features: features at theta', if they are known because the virtual step does not move the backbone.
        precision: dtype of the ordinary step's autocast, if it has one. v is computed in it as an ordinary gradient is.
    """
    virtual = {name: p.detach().requires_grad_() for name, p in virtual.items()}
    theta = _constants(method) | virtual
    with torch.autocast(views.images.device.type, precision, enabled=precision is not None):
        if features is None:
            loss = replay(method, views, targets, step, theta).loss
        else:
            torch.manual_seed(step.noise)
            loss = _call(method, theta, lambda m: m.loss(m.project(features), targets, step))
    return gradients(loss, virtual)


def forward_tangent(method: Method, views: Views, step: Step, v: Gradients) -> tuple[Features, Features]:
    """Return Z and D Z[v], exact, by one pass through the backbone in forward mode."""
    moving, constant = _split(method, v)
    features, moved = jvp(
        lambda theta: encode(method, views, step, constant | theta), (moving,), ({name: v[name] for name in moving},)
    )[:2]
    return features, moved


@torch.no_grad()
def difference_tangent(
    method: Method, views: Views, step: Step, v: Gradients, h: float, features: Features | None = None
) -> tuple[Features, Features]:
    """Return Z and (Z(theta + eps v) - Z) / eps, with eps = h |theta| / |v|.

    It costs one ordinary forward pass if Z is known, else two.
    """
    moving, constant = _split(method, v)
    eps = h * norm(moving.values()) / norm(v[name] for name in moving).clamp(min=1e-30)
    if features is None:
        features = encode(method, views, step, constant | moving)
    ahead = encode(method, views, step, constant | {name: p + eps * v[name] for name, p in moving.items()})
    return features, [(a - z) / eps for a, z in zip(ahead, features, strict=True)]


def along_heads(
    method: Method, targets: Targets, penalty: Penalty, v: Gradients, features: Features, moved: Features | None
) -> Tensor:
    """Return D_theta penalty [v], given Z and D Z[v], by forward mode through the heads.

    `moved` None means that the backbone does not move. The method's loss is not differentiated here, so it may have a
    custom backward pass.
    """
    theta = _constants(method)
    heads = {name: theta[name] for name in v if not name.startswith("backbone.")}
    constant = {name: p for name, p in theta.items() if name not in heads}
    start = [z.detach() for z in features]
    tangent = [torch.zeros_like(z) for z in start] if moved is None else list(moved)

    def value(heads: Gradients, features: list[Tensor]) -> Any:
        compare = lambda m: penalty(m.pairs(features, m.project(features), targets))  # noqa: E731
        return _call(method, constant | heads, compare)

    along: Tensor = jvp(value, (heads, start), ({name: v[name] for name in heads}, tangent))[1]
    return along


def along_double_backward(
    method: Method, views: Views, targets: Targets, step: Step, penalty: Penalty, v: Gradients
) -> Tensor:
    """Return <v, d/dtheta penalty>, differentiated twice through everything. It is slow and serves as the reference.

    With W ranks, `mixed` is d(sum of all ranks' penalties) / d(this rank's theta), and v is the same everywhere. So the
    ranks' <v, mixed> sum to W <v, d/dtheta (mean penalty)>. Each rank differentiates that sum by its copy of phi, and
    the average over the copies is exact. `mixed` itself must not be averaged before that.
    """
    theta = {name: p for name, p in trainable(method).items() if name in v}
    value = penalty(replay(method, views, targets, step).pairs)
    mixed = torch.autograd.grad(value, list(theta.values()), create_graph=True, allow_unused=True)
    along = sum((m * v[name]).sum() for name, m in zip(theta, mixed, strict=True) if m is not None)
    assert isinstance(along, Tensor)
    return along


@contextmanager
def meta_pass(method: Method, device: torch.device) -> Iterator[None]:
    """Run passes that have no side effects, in full precision and with derivatives of any order.

    BatchNorm statistics and the random state are restored. A fresh autocast context is needed too: within an old one, a
    weight that was changed in place keeps its cached copy. Compiled modules run eagerly, since their graphs have
    neither a forward mode nor a second derivative. The rounding error of TF32 would be as large as a difference.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        frozen_statistics(method),
        torch.random.fork_rng(devices=devices),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        _without_tf32(),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _constants(method: Method) -> Gradients:
    return {name: p.detach() for name, p in trainable(method).items()}


def _split(method: Method, v: Gradients) -> tuple[Gradients, Gradients]:
    """Return theta as two parts: the backbone's parameters that move along v, and the rest."""
    theta = _constants(method)
    moving = {name: theta.pop(name) for name in v if name.startswith("backbone.")}
    return moving, theta


class _At(nn.Module):
    """Calls a function of a method. `functional_call` lets it run at other parameters."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, function: Callable[[Method], Any]) -> Any:
        return function(self.method)


def _call(method: Method, theta: Mapping[str, Tensor], function: Callable[[Method], Any]) -> Any:
    return functional_call(_At(method), {f"method.{name}": p for name, p in theta.items()}, (function,))
