"""The meta semantic regularizer of ICL-MSR (Qiang et al., ICML 2022, arXiv 2206.14702).

The two views of an image share its background, so a contrastive loss rewards background features. The regularizer
adjusts for that (backdoor adjustment): f_msr proposes soft channel subsets, strata a_1 .. a_n, from the un-augmented
image, and the average over the strata of the probability that the reweighted positive is found becomes a second loss

    L_msr = - mean log (1/n) sum_t  e_t / (e_t + neg),    e_t = exp(sim(h(Z), h(sqrt(c) a_t * Z')) / tau)   (eq. 3-6)

Encoder and heads (theta) are trained on L_to = L_ct + lambda L_msr; f_msr (phi) so that the encoder *after* such a step
has a lower L_ct, and so that its strata differ (eq. 7, 8 and Algorithm 1):

    phi <- phi - beta d/dphi [ L_ct(theta - alpha d/dtheta L_to(theta, phi)) + gamma L_uni(phi) ]

L_ct does not depend on phi, so with v = grad L_ct(theta') the first term is the pure mixed second derivative
-alpha lambda d/dphi <v, d/dtheta L_msr(theta, phi)>, which is how it is computed here (`mode`), exactly.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from icl_msr.distributed import average, gather, rank
from icl_msr.losses.contrastive import full_precision, unit
from icl_msr.methods.base import Method, Output, Pair, Step, Targets, frozen_statistics
from icl_msr.regularizers.strata import StrataNetwork, random_partition, uniform, uniformity
from icl_msr.views import Views

Gradients = dict[str, Tensor]


class MetaSemanticRegularizer(nn.Module):
    """f_msr, its loss for the encoder and its own bi-level step.

    The paper's symbols name the keys: `lam` and `gamma` weight L_msr and L_uni, `n` strata, `u` sharpens L_uni.
    `weights` says where the strata come from: `meta` is the method; `uniform_only` trains phi on gamma L_uni alone;
    `joint` on L_to + gamma L_uni, first order; `random_net` freezes f_msr; `random` is a fixed partition of the
    channels; `ones` is one uniform stratum, which makes L_msr a second InfoNCE.
    """

    def __init__(
        self,
        channels: int,
        method_temperature: float | None,
        *,
        weights: Literal["meta", "uniform_only", "random", "random_net", "ones", "joint"],
        lam: NonNegativeFloat,
        gamma: NonNegativeFloat,
        n: PositiveInt,
        u: PositiveFloat,
        temperature: PositiveFloat | None,
        negatives: Literal["method", "in_batch", "none"],
        denominators: Literal["printed", "all"],
        mode: Literal["exact", "double_backward"],
        schedule: Literal["every", "per_epoch"],
        every: PositiveInt,
        alpha: Literal["relative", "lr"],
        relative_step: PositiveFloat,
        lr: PositiveFloat,
        width: Annotated[int, Field(gt=0, multiple_of=8)],
        image_size: PositiveInt,
        seed: int,
    ):
        super().__init__()
        self.lam, self.gamma, self.u, self.weights = lam, gamma, u, weights
        self.temperature = temperature or method_temperature or 0.5
        self.negatives, self.denominators = negatives, denominators
        self.mode, self.schedule, self.every = mode, schedule, every
        self.alpha, self.relative_step = alpha, relative_step
        self.network: StrataNetwork | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if weights == "ones":
            self.register_buffer("fixed", uniform(channels))
        elif weights == "random":
            self.register_buffer("fixed", random_partition(channels, n, seed))
        else:
            self.network = StrataNetwork(channels, n, width, image_size).requires_grad_(weights != "random_net")
        if weights in ("meta", "uniform_only", "joint"):
            assert self.network is not None
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)

    # ------------------------------------------------------------------------------------------ the loss for theta

    def strata(self, images: Tensor) -> Tensor:
        """A(X): un-augmented, normalised images (N, 3, H, W) to (N, S, c), rows of unit length."""
        if self.network is None:
            fixed: Tensor = self.get_buffer("fixed")
            return fixed.expand(len(images), -1, -1)
        strata: Tensor = self.network(images)
        return strata

    def forward(self, images: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """L_msr for the encoder: f_msr is held fixed."""
        with torch.no_grad():
            strata = self.strata(images)
        return self.penalty(pairs, strata)

    def penalty(self, pairs: Sequence[Pair], strata: Tensor) -> Tensor:
        """L_msr (eq. 3-6), averaged over anchors and directions.

        Only the positive is reweighted. Global average pooling commutes with channel weights, so the pooled features
        are reweighted and no feature map is ever copied. Strata enter as sqrt(c) a_t (ours): a uniform a_t is then
        the identity.
        """
        losses = []
        for pair in pairs:
            reweighted = math.sqrt(strata.shape[-1]) * strata * pair.key_features[:, None]  # (N, S, c)
            with frozen_statistics(pair.head):
                positives = pair.head(reweighted.flatten(0, 1)).reshape(*strata.shape[:2], -1)  # (N, S, D)
            losses.append(self._interventional_loss(unit(positives), pair, pairs))
        return torch.stack(losses).mean()

    @full_precision
    def _interventional_loss(self, positives: Tensor, pair: Pair, pairs: Sequence[Pair]) -> Tensor:
        """-log P_do of one direction, averaged over anchors, from the reweighted positives (N, S, D)."""
        anchor = unit(pair.anchor)
        log_p = torch.einsum("nd,nsd->ns", anchor, positives) / self.temperature
        if self.negatives != "none":
            log_p = log_p - torch.logaddexp(log_p, self._log_negatives(pair, pairs, anchor)[:, None])
        return -(torch.logsumexp(log_p, dim=1) - math.log(log_p.shape[1])).mean()

    def _log_negatives(self, pair: Pair, pairs: Sequence[Pair], anchor: Tensor) -> Tensor:
        """log neg(i, j), (N,): over the method's bank, else over the other images' keys on all ranks."""
        if pair.bank is not None and self.negatives == "method":
            return torch.logsumexp(anchor @ unit(pair.bank).T / self.temperature, dim=1)
        # "printed": keys of the other view only, as in eq. 4; "all": of both views, 2N - 2, as the paper's prose says.
        keys = [pair.key] if self.denominators == "printed" else [other.key for other in pairs]
        everyone = torch.cat([gather(unit(key)) for key in keys])
        logits = anchor @ everyone.T / self.temperature
        image = torch.arange(len(anchor), device=anchor.device) + rank() * len(anchor)
        own = image[:, None] + torch.arange(len(keys), device=anchor.device) * (len(everyone) // len(keys))
        return torch.logsumexp(logits.scatter(1, own, float("-inf")), dim=1)

    # ------------------------------------------------------------------------------------------ the step of phi

    def due(self, step: Step) -> bool:
        """Whether phi moves at this optimiser step."""
        return self.optimizer is not None and self.schedule == "every" and step.index % self.every == 0

    def meta_step(
        self,
        method: Method,
        views: Views,
        targets: Targets,
        step: Step,
        inner: Mapping[str, Tensor] | None,
        learning_rate: float,
    ) -> dict[str, float]:
        """One step of phi on a batch; nothing of the method moves.

        Args:
            method, views, targets, step: what the ordinary step was computed from.
            inner: gradient of L_to by parameter name, as the ordinary step has it, averaged over ranks; None: computed
                here.
            learning_rate: theta's current one, for `alpha=lr`.

        Returns:
            Norms of both parts of phi's gradient, and alpha, for the log.
        """
        assert self.network is not None
        assert self.optimizer is not None
        phi = list(self.network.parameters())
        log = {}
        with meta_pass(method, views.images.device):
            strata = self.strata(views.images)
            spread = self.gamma * uniformity(strata, self.u)
            gradient = average(torch.autograd.grad(spread, phi, retain_graph=self.weights == "joint"))
            log["uniformity"] = float(average([spread.detach()])[0]) / self.gamma if self.gamma else 0.0
            log["uniformity_grad_norm"] = norm(gradient)
            if self.weights != "uniform_only":
                if self.weights == "joint":
                    pairs = replay(method, views, targets, step).pairs
                    signal = average(torch.autograd.grad(self.lam * self.penalty(pairs, strata), phi))
                else:
                    if inner is None:
                        inner = self.inner_gradient(method, views, targets, step)
                    log["alpha"] = self.step_size(method, inner, learning_rate)
                    signal = self.meta_gradient(method, views, targets, step, inner, log["alpha"])
                log["meta_grad_norm"] = norm(signal)
                gradient = [a + b for a, b in zip(gradient, signal, strict=True)]
        for parameter, g in zip(phi, gradient, strict=True):
            parameter.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return log

    def step_size(self, method: Method, inner: Mapping[str, Tensor], learning_rate: float) -> float:
        """alpha of the virtual step: `lr`, or r |theta| / |g|, which means the same under any optimiser."""
        if self.alpha == "lr":
            return learning_rate
        theta = trainable(method)
        return self.relative_step * norm(theta.values()) / max(norm(inner.values()), 1e-12)

    def inner_gradient(self, method: Method, views: Views, targets: Targets, step: Step) -> Gradients:
        """Gradient of L_to = L_ct + lambda L_msr by theta."""
        theta = trainable(method)
        output = replay(method, views, targets, step)
        return gradients(output.loss + self.lam * self.forward(views.images, output.pairs), theta)

    def meta_gradient(
        self, method: Method, views: Views, targets: Targets, step: Step, inner: Mapping[str, Tensor], alpha: float
    ) -> list[Tensor]:
        """d/dphi L_ct(theta - alpha d/dtheta L_to(theta, phi)), one tensor a parameter of f_msr."""
        assert self.network is not None
        theta = trainable(method)
        virtual = {name: (p - alpha * inner[name]).detach().requires_grad_() for name, p in theta.items()}
        v = gradients(replay(method, views, targets, step, virtual).loss, virtual)

        directional = self._forward_mode if self.mode == "exact" else self._double_backward
        along = directional(method, views, targets, step, v, self.strata(views.images))
        signal = torch.autograd.grad(self.lam * along, list(self.network.parameters()))
        return [-alpha * s for s in average(signal)]

    def _forward_mode(
        self, method: Method, views: Views, targets: Targets, step: Step, v: Gradients, strata: Tensor
    ) -> Tensor:
        """D_theta L_msr [v] as a function of the strata: the tangent v is pushed through the network.

        Strata enter after the backbone, whose features and their tangent are constants to them. So the backbone needs
        one pass in forward mode and keeps no graph; only the heads are differentiated backwards.
        """
        at = _At(method)
        theta = {name: p.detach() for name, p in trainable(at).items()}
        tangent = {f"method.{name}": t for name, t in v.items()}

        def encode(theta: Gradients) -> Any:
            torch.manual_seed(step.noise)
            return functional_call(at, theta, (lambda m: m.encode(views),))

        def penalty(theta: Gradients, features: list[Tensor]) -> Any:
            compare = lambda m: self.penalty(m.pairs(features, m.project(features), targets), strata)  # noqa: E731
            return functional_call(at, theta, (compare,))

        features, moved = jvp(encode, (theta,), (tangent,))[:2]
        along: Tensor = jvp(penalty, (theta, features), (tangent, moved))[1]
        return along

    def _double_backward(
        self, method: Method, views: Views, targets: Targets, step: Step, v: Gradients, strata: Tensor
    ) -> Tensor:
        """The same as <v, d/dtheta L_msr>, differentiated twice: slower, the oracle of `_forward_mode`.

        With W ranks, `mixed` is d(sum of all ranks' L_msr) / d(this rank's theta) and v is the same everywhere, so the
        ranks' <v, mixed> sum to W <v, d/dtheta (mean L_msr)>. Each rank differentiates that sum by its copy of phi,
        and the average over the copies is exact; `mixed` itself must not be averaged before.
        """
        theta = trainable(method)
        penalty = self.penalty(replay(method, views, targets, step).pairs, strata)
        mixed = torch.autograd.grad(penalty, list(theta.values()), create_graph=True, allow_unused=True)
        along = sum((m * v[name]).sum() for name, m in zip(theta, mixed, strict=True) if m is not None)
        assert isinstance(along, Tensor)
        return along

    # ------------------------------------------------------------------------------------------ phi's Adam is state

    def get_extra_state(self) -> dict[str, Any]:
        """phi's optimiser travels in the state dict, so that every checkpoint has it."""
        return {} if self.optimizer is None else dict(self.optimizer.state_dict())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """See `get_extra_state`."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)


class _At(nn.Module):
    """Calls a function of a method; inside `functional_call`, at other parameters."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, function: Callable[[Method], Any]) -> Any:
        return function(self.method)


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """theta: the parameters that the ordinary optimiser trains, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def norm(tensors: Any) -> float:
    """Euclidean norm of many tensors taken as one vector."""
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm([t.detach() for t in tensors]))))


def gradients(loss: Tensor, theta: Mapping[str, Tensor]) -> Gradients:
    """Gradient of the mean of all ranks' losses by name, zero where it does not depend on a parameter."""
    values = average(torch.autograd.grad(loss, list(theta.values()), materialize_grads=True))
    return dict(zip(theta, values, strict=True))


def replay(
    method: Method, views: Views, targets: Targets, step: Step, theta: Mapping[str, Tensor] | None = None
) -> Output:
    """The ordinary forward pass again, same random masks, at theta or at the method's own parameters."""
    torch.manual_seed(step.noise)
    if theta is None:
        output: Output = method(views, targets, step)
    else:
        output = functional_call(method, dict(theta), (views, targets, step))
    return output


@contextmanager
def meta_pass(method: Method, device: torch.device) -> Iterator[None]:
    """Passes that leave no trace: statistics and random state stay, precision is full, derivatives of any order exist.

    A fresh autocast context is needed too: within an old one, a weight that was changed in place keeps its cached copy.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        frozen_statistics(method),
        torch.random.fork_rng(devices=devices),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):
        yield
