"""What is special to MoCo v3: the scale of its loss, the rising momentum, the frozen patch projection."""

import pytest
import torch
import torch.nn.functional as F
from support.toys import SMALL, SmoothBackbone, make_method, make_views
from torch import Tensor, nn

from icl_msr.losses.contrastive import unit
from icl_msr.methods import MoCoV3, Step
from icl_msr.models.momentum import rising_momentum


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_that_of_the_papers_pseudocode(temperature: float) -> None:
    method, views = make_method("moco_v3", temperature=temperature), make_views()
    targets = method.targets(views)
    output = method(views, targets, Step(0, 10))

    def ctr(q: Tensor, k: Tensor) -> Tensor:
        return 2 * temperature * F.cross_entropy(unit(q) @ unit(k).T / temperature, torch.arange(len(q)))

    (q1, q2), (k1, k2) = output.embeddings, targets.embeddings
    torch.testing.assert_close(output.loss, ctr(q1, k2) + ctr(q2, k1))


def test_momentum_rises() -> None:
    method = make_method("moco_v3")
    assert isinstance(method, MoCoV3)
    with torch.no_grad():
        for parameter in method.projector.parameters():
            parameter.add_(1)
    before = [p.clone() for p in method.momentum_encoder.projector.parameters()]
    method.advance(Step(5, 10))
    for after, old in zip(method.momentum_encoder.projector.parameters(), before, strict=True):
        torch.testing.assert_close(after, old + 1 - rising_momentum(SMALL["momentum"], 0.5))


class Patches(SmoothBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(("freeze", "names"), [(True, {"patch_embed.weight", "patch_embed.bias"}), (False, set())])
def test_the_patch_projection_is_frozen(freeze: bool, names: set[str]) -> None:
    backbone = Patches()
    keys = {"hidden_dim": 8, "embedding_dim": 4, "temperature": 0.2, "momentum": 0.9, "momentum_statistics": "own"}
    method = MoCoV3(backbone, freeze_patches=freeze, **keys)  # type: ignore[arg-type]
    frozen = {id(parameter) for parameter in method.frozen(Step(0, 10))}
    assert {name for name, p in backbone.named_parameters() if id(p) in frozen} == names
