"""Small, smooth, double-precision models for exact tests."""

from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from icl_msr.core.config import build, config_dir
from icl_msr.core.views import NonSemantic, Views
from icl_msr.methods import Method
from icl_msr.models.backbones import Backbone
from icl_msr.regularizers import MetaSemanticRegularizer
from support.tiny import composed

METHODS = sorted(file.stem for file in (config_dir() / "method").glob("*.yaml"))

FACTS: dict[str, Any] = {"classes": 3, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
"""The facts about the data that a method receives."""

SMALL: dict[str, Any] = {
    "hidden_dim": 12,
    "embedding_dim": 6,
    "queue_size": 20,
    "momentum": 0.9,
    "bottleneck_dim": 4,
    "random_features": 32,
    "prototypes": 10,
}
"""Values of keys, for every method that has them."""

SMALLER: dict[str, dict[str, Any]] = {"wmse": {"embedding_dim": 2, "whitening_size": 4}}
"""Values for single methods, since a few images can whiten only a few dimensions."""

REGULARIZER: dict[str, Any] = {
    "weights": "meta",
    "lam": 0.7,
    "gamma": 0.3,
    "n": 3,
    "u": 2.0,
    "temperature": None,
    "negatives": "method",
    "denominators": "printed",
    "mode": "exact",
    "difference_step": 1e-6,
    "scope": "all",
    "schedule": "every",
    "every": 1,
    "alpha": "relative",
    "relative_step": 0.05,
    "reduction": "mean",
    "lr": 1e-2,
    "uniformity_trains": "head",
    "trunk": "trained",
    "head_scale": 1.0,
    "width": 8,
    "image_size": 8,
    "seed": 0,
}


class SmoothBackbone(Backbone):
    """An infinitely differentiable backbone with BatchNorm. Difference quotients converge on it."""

    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Softplus())
        last = (nn.Conv2d(6, 8, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(nn.Sequential(*stem, *last), 8, load="")


def make_views(
    n: int = 6, size: int = 8, negatives: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Views:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator, dtype=dtype)
    views = [images + 0.3 * torch.randn(images.shape, generator=generator, dtype=dtype) for _ in range(2)]
    rows = torch.randn(n, negatives, 3, size, size, generator=generator, dtype=dtype)
    non_semantic = NonSemantic(rows, alpha=2.0, repulsion=0.25) if negatives else None
    return Views(images, views, torch.arange(n), torch.arange(n) % 3, non_semantic)


def smooth(module: nn.Module) -> nn.Module:
    """Replace ReLUs by softplus, which has all derivatives, and return the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus())
        else:
            smooth(child)
    return module


@cache
def method_config(name: str) -> dict[str, Any]:
    """Return the method's YAML with small sizes."""
    node: Any = OmegaConf.to_container(composed(f"method={name}").method)
    small = SMALL | SMALLER.get(name, {})
    return {key: small.get(key, value) for key, value in node.items()}


def make_method(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **keys: Any) -> Method:
    torch.manual_seed(seed)
    method: Method = build({**method_config(name), **keys}, backbone=SmoothBackbone(), **FACTS)
    return smooth(method).to(dtype).train()  # type: ignore[return-value]


def skip_refused(method: Method, *groups: str) -> None:
    """Skip the test if the method refuses one of the groups."""
    for group in groups:
        if group in method.refuses:
            pytest.skip(f"{group}: {method.refuses[group]}")


def make_regularizer(method: Method, **keys: Any) -> MetaSemanticRegularizer:
    torch.manual_seed(1)
    regularizer = MetaSemanticRegularizer(method.channels, method.temperature, **{**REGULARIZER, **keys})
    return smooth(regularizer).double()  # type: ignore[return-value]
