"""Small, smooth, double-precision stand-ins for the real thing."""

from typing import Any

import torch
from torch import Tensor, nn

from icl_msr.methods import BYOL, Method, MoCo, SimCLR
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.views import NonSemantic, Views

METHODS = {
    "simclr": lambda backbone: SimCLR(backbone, hidden_dim=12, embedding_dim=6, temperature=0.5),
    "moco": lambda backbone: MoCo(
        backbone,
        hidden_dim=12,
        embedding_dim=6,
        batch_norm=True,
        temperature=0.2,
        queue_size=20,
        momentum=0.9,
        momentum_statistics="own",
    ),
    "byol": lambda backbone: BYOL(backbone, hidden_dim=12, embedding_dim=6, momentum=0.9, momentum_statistics="own"),
}

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
    "schedule": "every",
    "every": 1,
    "alpha": "relative",
    "relative_step": 0.05,
    "lr": 1e-2,
    "width": 8,
    "image_size": 8,
    "seed": 0,
}


class SmoothBackbone(nn.Module):
    """Infinitely differentiable, so that difference quotients converge; with BatchNorm, as real backbones have."""

    channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Softplus(), nn.Conv2d(6, 8, 3), nn.Softplus()
        )

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.net(images)
        return maps.mean(dim=(2, 3))


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
    """ReLUs become softplus, which has all derivatives."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus())
        else:
            smooth(child)
    return module


def make_method(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Method:
    torch.manual_seed(seed)
    method: Method = METHODS[name](SmoothBackbone())
    return smooth(method).to(dtype).train()  # type: ignore[return-value]


def make_regularizer(method: Method, **keys: Any) -> MetaSemanticRegularizer:
    torch.manual_seed(1)
    regularizer = MetaSemanticRegularizer(8, method.temperature, **{**REGULARIZER, **keys})
    return smooth(regularizer).double()  # type: ignore[return-value]
