"""The meta semantic regularizer of ICL-MSR (Qiang et al., ICML 2022, arXiv 2206.14702).

The two views of an image share its background, so a contrastive loss rewards background features. The regularizer
corrects for that by backdoor adjustment. f_msr predicts soft channel subsets, strata a_1 .. a_n, from the un-augmented
image. The second loss is the average over the strata of the probability that the reweighted positive is found:

    L_msr = - mean log (1/n) sum_t  e_t / (e_t + neg),    e_t = exp(sim(h(Z), h(sqrt(c) a_t * Z')) / tau)   (eq. 3-6)

Encoder and heads (theta) are trained on L_to = L_ct + lambda L_msr. f_msr (phi) is trained so that the encoder *after*
such a step has a lower L_ct, and so that its strata differ (eq. 7, 8 and Algorithm 1):

    phi <- phi - beta d/dphi [ L_ct(theta - alpha d/dtheta L_to(theta, phi)) + gamma L_uni(phi) ]

L_ct does not depend on phi, so with v = grad L_ct(theta') the first term is the pure mixed second derivative
-alpha lambda d/dphi <v, d/dtheta L_msr(theta, phi)>. `bilevel` computes it in the way that `mode` selects.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from omegaconf import OmegaConf
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from icl_msr.core.config import GIVEN, Seed, build, check_node, config_dir
from icl_msr.core.distributed import average, gather, rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import full_precision, unit
from icl_msr.methods.base import Method, Output, Pair, Step, Targets
from icl_msr.models.batchnorm import GlobalBatchNorm, frozen_statistics
from icl_msr.regularizers.base import Pass, Regularizer
from icl_msr.regularizers.bilevel import (
    Features,
    Gradients,
    Scope,
    along_double_backward,
    along_heads,
    difference_tangent,
    encode,
    forward_tangent,
    gradients,
    meta_pass,
    norm,
    ordinary_gradient,
    outer_gradient,
    replay,
    scoped,
    trainable,
)
from icl_msr.regularizers.strata import StrataNetwork, diversity, random_partition, uniform, uniformity


class MetaSemanticRegularizer(Regularizer):
    """f_msr, its loss for the encoder and its own bi-level step.

    The keys have the names of the paper's symbols: `lam` and `gamma` weight L_msr and L_uni, `n` is the number of
    strata, and `u` sharpens L_uni. `weights` selects the strata:

    * `meta`: f_msr, trained by the bi-level step; this is the method.
    * `uniform_only`: f_msr, trained only on gamma L_uni.
    * `joint`: f_msr, trained on L_to + gamma L_uni, first order.
    * `random_net`: f_msr, frozen.
    * `random`: a fixed partition of the channels.
    * `ones`: one uniform stratum, which makes L_msr a second InfoNCE.

    `reduction` concerns the bi-level step alone: `sum` adds L_ct and L_msr up over the anchors of all ranks, as the
    paper prints them. theta's own step always takes means, since Adam's step does not depend on the scale of its loss.
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
        mode: Literal["exact", "difference", "near_free", "double_backward"],
        difference_step: PositiveFloat,
        scope: Scope,
        schedule: Literal["every", "per_epoch"],
        every: PositiveInt,
        alpha: Literal["relative", "lr"],
        relative_step: PositiveFloat,
        reduction: Literal["mean", "sum"],
        lr: PositiveFloat,
        uniformity_trains: Literal["head", "all"],
        trunk: Literal["trained", "frozen"],
        head_scale: PositiveFloat,
        width: Annotated[int, Field(gt=0, multiple_of=8)],
        image_size: PositiveInt,
        seed: Seed,
    ):
        super().__init__()
        self.lam, self.gamma, self.u, self.weights = lam, gamma, u, weights
        self.temperature = temperature or method_temperature or 0.5
        self.negatives, self.denominators = negatives, denominators
        self.mode, self.difference_step, self.scope = mode, difference_step, scope
        self.schedule, self.every = schedule, every
        self.alpha, self.relative_step, self.reduction = alpha, relative_step, reduction
        self.uniformity_trains = uniformity_trains
        self.network: StrataNetwork | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        if weights == "ones":
            self.register_buffer("fixed", uniform(channels))
        elif weights == "random":
            self.register_buffer("fixed", random_partition(channels, n, seed))
        else:
            self.network = StrataNetwork(channels, n, width, image_size, head_scale)
            self.network.requires_grad_(weights != "random_net")
            if trunk == "frozen":
                self.network.trunk.requires_grad_(False)
        if weights in ("meta", "uniform_only", "joint"):
            self.optimizer = torch.optim.Adam(self.phi.values(), lr=lr)

    @property
    def phi(self) -> dict[str, Tensor]:
        """Trained parameters of f_msr, by name."""
        return {} if self.network is None else trainable(self.network)

    @classmethod
    def with_defaults(
        cls, channels: int, method_temperature: float | None, *, seed: int, **keys: Any
    ) -> "MetaSemanticRegularizer":
        """Build the regularizer with the values of `conf/regularizer/msr.yaml`, changed by `keys`.

        It is meant for a training loop of your own.

        Raises:
            UserError: a key does not exist, or has a value that is not allowed.
        """
        node: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "regularizer" / "msr.yaml"))
        node |= {"seed": seed, **keys}
        check_node("regularizer", node, GIVEN["regularizer"])
        regularizer: MetaSemanticRegularizer = build(node, channels=channels, method_temperature=method_temperature)
        return regularizer

    # ------------------------------------------------------------------------------------------ the loss for theta

    def strata(self, images: Tensor) -> Tensor:
        """Return the strata A(X) (N, S, c), rows of unit length, of un-augmented, normalised images (N, 3, H, W)."""
        if self.network is None:
            fixed: Tensor = self.get_buffer("fixed")
            return fixed.expand(len(images), -1, -1)
        strata: Tensor = self.network(images)
        return strata

    def forward(self, views: Views, output: Output, step: Step) -> Tensor:
        """Return lambda L_msr () for the encoder, with f_msr held fixed."""
        with torch.no_grad():
            strata = self.strata(views.images)
        penalty = self.penalty(output.pairs, strata)
        if step.logs:
            output.log |= {"loss/msr": penalty.detach(), **_named(self.diagnostics(views.images, output.pairs))}
        return self.lam * penalty

    def penalty(self, pairs: Sequence[Pair], strata: Tensor) -> Tensor:
        """Return L_msr () (eq. 3-6), averaged over anchors and directions.

        Only the positive is reweighted. Global average pooling commutes with channel weights, so the pooled features
        are reweighted and no feature map is copied. Strata enter as sqrt(c) a_t (ours), so that a uniform a_t is the
        identity.
        """
        losses = [
            -(torch.logsumexp(log_p, dim=1) - math.log(log_p.shape[1])).mean() for log_p in self._log_p(pairs, strata)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def diagnostics(self, images: Tensor, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """Return numbers () for the log: `loss_t`, L_msr with only stratum t, and `diversity` of the strata."""
        strata = self.strata(images)
        alone = -torch.stack([log_p.mean(0) for log_p in self._log_p(pairs, strata)]).mean(0)  # (S,)
        return {**diversity(strata), **{f"loss_{t}": loss for t, loss in enumerate(alone, start=1)}}

    def _log_p(self, pairs: Sequence[Pair], strata: Tensor) -> list[Tensor]:
        """Return log e_t / (e_t + neg), (N, S), of each direction."""
        found = []
        for pair in pairs:
            reweighted = math.sqrt(strata.shape[-1]) * strata * pair.key_features[:, None]  # (N, S, c)
            with frozen_statistics(pair.head):
                positives = pair.head(reweighted.flatten(0, 1)).reshape(*strata.shape[:2], -1)  # (N, S, D)
            found.append(self._against_negatives(unit(positives), pair, pairs))
        return found

    @full_precision
    def _against_negatives(self, positives: Tensor, pair: Pair, pairs: Sequence[Pair]) -> Tensor:
        """Return log e_t / (e_t + neg), (N, S), of one direction, from the reweighted positives (N, S, D)."""
        anchor = unit(pair.anchor)
        log_p = torch.einsum("nd,nsd->ns", anchor, positives) / self.temperature
        if self.negatives != "none":
            log_p = log_p - torch.logaddexp(log_p, self._log_negatives(pair, pairs, anchor)[:, None])
        return log_p

    def _log_negatives(self, pair: Pair, pairs: Sequence[Pair], anchor: Tensor) -> Tensor:
        """Return log neg(i, j), (N,), over the method's bank or over the other images' keys on all ranks."""
        if pair.bank is not None and self.negatives == "method":
            return torch.logsumexp(anchor @ unit(pair.bank).T / self.temperature, dim=1)
        # "printed": keys of the other view only, as in eq. 4. "all": of both views, 2N - 2, as in the paper's text.
        keys = [pair.key] if self.denominators == "printed" else [other.key for other in pairs]
        everyone = torch.cat([gather(unit(key)) for key in keys])
        logits = anchor @ everyone.T / self.temperature
        image = torch.arange(len(anchor), device=anchor.device) + rank() * len(anchor)
        own = image[:, None] + torch.arange(len(keys), device=anchor.device) * (len(everyone) // len(keys))
        return torch.logsumexp(logits.scatter(1, own, float("-inf")), dim=1)

    # ------------------------------------------------------------------------------------------ the step of phi

    def due(self, step: Step) -> bool:
        """Return True if phi is updated at this optimiser step."""
        return self.optimizer is not None and self.schedule == "every" and step.index % self.every == 0

    @override
    def before_step(self, batch: Pass) -> dict[str, Tensor]:
        return self._step(batch, ordinary_gradient(batch.method)) if self.due(batch.step) else {}

    @override
    def after_epoch(self, batches: Iterable[Pass]) -> dict[str, Tensor]:
        log: dict[str, Tensor] = {}
        if self.optimizer is not None and self.schedule == "per_epoch":
            for batch in batches:
                log = self._step(batch, None)
        return log

    def _step(self, batch: Pass, inner: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        features = batch.output.features if batch.output is not None and batch.precision is None else None
        # A gradient in fp16 would need a scale of its own.
        precision = batch.precision if batch.precision is torch.bfloat16 else None
        step = replace(batch.step, logs=False)  # repeated passes log nothing
        arguments = (batch.method, batch.views, batch.targets, step, inner, batch.learning_rate)
        return _named(self.meta_step(*arguments, features, precision))

    def meta_step(
        self,
        method: Method,
        views: Views,
        targets: Targets,
        step: Step,
        inner: Mapping[str, Tensor] | None,
        learning_rate: float,
        features: Features | None = None,
        precision: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Update phi by one step on a batch, without any change to the method.

        Args:
            method, views, targets, step: inputs of the ordinary step.
            inner: gradient of L_to by parameter name, averaged over ranks, as in the ordinary step. None: it is
                computed here.
            learning_rate: theta's current learning rate, for `alpha=lr`.
            features: features of the ordinary step, if they have full precision. They save `mode=difference` a forward
                pass.
            precision: dtype of the ordinary step's autocast, if it has one. v is computed in it, all else in full
                precision.

        Returns:
            Numbers () for the log: the norms of both parts of phi's gradient, L_uni, and alpha, the factor of the
            gradient of the means. They stay on the device, so that the host does not wait.

        Raises:
            UserError: the method's precision, or a layer of its heads, makes the meta gradient wrong.
        """
        assert self.network is not None
        assert self.optimizer is not None
        phi = list(self.phi.values())
        log: dict[str, Tensor] = {}
        if self.weights == "meta":
            require_exact(method)
        with meta_pass(method, views.images.device):
            seen = self.network.look(views.images)
            strata = self.network.assign(seen)
            # One partition of the channels for all images minimises L_uni: a trunk trained on it ignores the image.
            apart = strata if self.uniformity_trains == "all" else self.network.assign(seen.detach())
            spread = self.gamma * uniformity(apart, self.u)
            gradient = average(torch.autograd.grad(spread, phi, retain_graph=True, materialize_grads=True))
            log["uniformity"] = average([spread.detach()])[0] / (self.gamma or 1)
            log["uniformity_grad_norm"] = norm(gradient)
            if self.weights != "uniform_only":
                terms = self.terms(method, views, targets, step)
                if self.weights == "joint":
                    pairs = replay(method, views, targets, step).pairs
                    signal = average(torch.autograd.grad(self.lam * self.penalty(pairs, strata), phi))
                else:
                    if inner is None:
                        inner = self.inner_gradient(method, views, targets, step)
                    log["alpha"] = self.step_size(method, inner, learning_rate * terms)
                    arguments = (method, views, targets, step, inner, log["alpha"])
                    signal = self.meta_gradient(*arguments, features, precision)
                signal = [terms * s for s in signal]
                log["meta_grad_norm"] = norm(signal)
                gradient = [a + b for a, b in zip(gradient, signal, strict=True)]
        for parameter, g in zip(phi, gradient, strict=True):
            parameter.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return log

    @torch.no_grad()
    def terms(self, method: Method, views: Views, targets: Targets, step: Step) -> int:
        """Return the number of anchors on all ranks that L_ct and L_msr add up; 1 if they are means."""
        if self.reduction == "mean":
            return 1
        return world_size() * sum(len(pair.anchor) for pair in replay(method, views, targets, step).pairs)

    def step_size(self, method: Method, inner: Mapping[str, Tensor], learning_rate: float) -> Tensor:
        """Return alpha () of the virtual step: the learning rate, or r |theta| / |g|, the same under any optimiser."""
        theta = scoped(method, self.scope)
        if self.alpha == "lr":
            return next(iter(theta.values())).new_full((), learning_rate, dtype=torch.float64)
        return self.relative_step * norm(theta.values()) / norm(inner[name] for name in theta).clamp(min=1e-12)

    def inner_gradient(self, method: Method, views: Views, targets: Targets, step: Step) -> Gradients:
        """Return the gradient of L_to = L_ct + lambda L_msr, by name. It is zero for parameters frozen at this step."""
        theta = trainable(method)
        output = replay(method, views, targets, step)
        inner = gradients(output.loss + self(views, output, step), theta)
        frozen = {id(p) for p in method.frozen(step)}
        return {name: torch.zeros_like(g) if id(theta[name]) in frozen else g for name, g in inner.items()}

    def meta_gradient(
        self,
        method: Method,
        views: Views,
        targets: Targets,
        step: Step,
        inner: Mapping[str, Tensor],
        alpha: Tensor,
        features: Features | None = None,
        precision: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Return d/dphi L_ct(theta - alpha d/dtheta L_to(theta, phi)), a tensor for each of phi. See `bilevel`."""
        assert self.network is not None
        theta = scoped(method, self.scope)
        penalty = partial(self.penalty, strata=self.strata(views.images))
        still = self.scope == "projector"
        if still and features is None:
            with torch.no_grad():
                features = encode(method, views, step, theta)

        if self.mode == "near_free":
            v = {name: inner[name] for name in theta}
        else:
            virtual = {name: p - alpha * inner[name] for name, p in theta.items()}
            v = outer_gradient(method, views, targets, step, virtual, features if still else None, precision)

        if self.mode == "double_backward":
            along = along_double_backward(method, views, targets, step, penalty, v)
        else:
            moved = None
            if not still:
                if self.mode == "exact":
                    features, moved = forward_tangent(method, views, step, v)
                else:
                    features, moved = difference_tangent(method, views, step, v, self.difference_step, features)
            assert features is not None
            along = along_heads(method, targets, penalty, v, features, moved)
        signal = torch.autograd.grad(self.lam * along, list(self.phi.values()))
        return [-alpha * s for s in average(signal)]

    # ----------------------------------------------------------- the state dict contains phi's Adam

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {} if self.optimizer is None else dict(self.optimizer.state_dict())

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state)


def _named(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the numbers under the names that they have in the log."""
    return {f"msr/{name}": number for name, number in numbers.items()}


def require_exact(method: Method) -> None:
    """Check that the heads can be differentiated through their forward mode.

    Raises:
        UserError: the method has half precision, or a head has torch's BatchNorm, whose tangent has a wrong gradient.
    """
    for name, layer in method.named_modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, GlobalBatchNorm) and "backbone." not in name:
            raise UserError(
                f"{name} is a {type(layer).__name__}, through whose tangent torch differentiates wrongly; build heads "
                "with icl_msr.models.heads.mlp, or pass them to icl_msr.models.batchnorm.global_batch_norm."
            )
    if any(p.dtype.itemsize < 4 for p in method.parameters()):
        raise UserError("The meta gradient needs parameters of full precision; choose bf16-mixed or 32-true.")
