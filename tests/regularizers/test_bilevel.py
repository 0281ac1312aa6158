"""The meta gradient of a transformer, whose attention has no forward mode in its fused kernel, with random depth."""

import pytest
import torch
from support.toys import FACTS, make_regularizer, make_views, method_config, smooth

from icl_msr.core.config import build
from icl_msr.methods import Step
from icl_msr.models.backbones import timm_model
from icl_msr.regularizers.bilevel import meta_pass, scoped

OPTIONS = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "drop_path_rate": 0.4}


@pytest.mark.parametrize("name", ["simclr", "byol", "dino"])
def test_random_depth_is_replayed_in_every_pass(name: str) -> None:
    torch.manual_seed(0)
    backbone = timm_model(8, name="vit_tiny_patch16_224", options=OPTIONS, weights=None)
    method = smooth(build(method_config(name), backbone=backbone, **FACTS)).double().train()
    views, step, found = make_views(n=8), Step(0, 10, noise=3), {}
    for mode in ("double_backward", "exact", "difference"):
        regularizer = make_regularizer(method, mode=mode)
        with meta_pass(method, views.images.device):
            targets = method.targets(views)
            inner = regularizer.inner_gradient(method, views, targets, step)
            signal = regularizer.meta_gradient(method, views, targets, step, inner, 0.1)
        found[mode] = torch.cat([s.flatten() for s in signal])
    scale = found["double_backward"].abs().max()
    assert scale > 0
    assert (found["exact"] - found["double_backward"]).abs().max() <= 1e-9 * scale
    assert (found["difference"] - found["double_backward"]).abs().max() <= 1e-3 * scale
    last = scoped(method, "last_stage")
    assert "backbone.net.blocks.2.attn.qkv.weight" in last
    assert "backbone.net.blocks.1.attn.qkv.weight" not in last
