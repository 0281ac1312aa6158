"""What is said to cure shortcuts composes: every combination trains for two batches or is refused in one sentence."""

import itertools
import math

import pytest
from support.tiny import MODEL, composed, trained

from icl_msr.cli.assemble import require_meaning
from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.models.backbones import Backbone

CHOICES = {
    "method": ("simclr", "moco", "supcon", "debiased", "byol"),
    "background": ("none", "swap", "mix", "random"),
    "regularizer": ("none", "ifm", "msr"),
    "negatives": ("none", "patch", "texture"),
    "hard_negatives": ("none", "hcl", "mochi", "synco"),
}
EXTRA = {
    "debiased": ("loader.sampler=group_balanced",),
    "simclr": ("augment.views=[{},{},{}]",),
}
"""Further words of a method, so that each choice outside the groups is met too."""

EVERY = list(itertools.product(*CHOICES.values()))
SOME = [EVERY[k] for k in range(0, len(EVERY), 31)]
"""A part in which every choice occurs beside several others. 31 divides no number of choices."""


def outcome(values: tuple[str, ...]) -> str:
    """Train for two batches and return `ran`, or return the sentence of a refusal."""
    words = [f"{group}={value}" for group, value in zip(CHOICES, values, strict=True)]
    words += EXTRA.get(values[0], ())
    settings = check(composed(*MODEL, *words))
    backbone = build(settings.backbone, image_size=16)
    assert isinstance(backbone, Backbone)
    method = build(settings.method, backbone=backbone, classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    method.hard_negatives = build(settings.hard_negatives)
    try:
        require_meaning(settings, method, 1)
    except UserError as refusal:
        return str(refusal)
    module, trainer = trained(*words)
    assert trainer.global_step == 2
    assert math.isfinite(float(trainer.logged_metrics.get("loss", 0.0)))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    return "ran"


def expected(values: tuple[str, ...]) -> str | None:
    """The group whose choice is refused; None if all have a meaning."""
    method, _, regularizer, _, hard = values
    if method == "supcon" and regularizer != "none":
        return "regularizer"
    if (method in ("supcon", "byol") and hard != "none") or (method == "debiased" and hard in ("mochi", "synco")):
        return "hard_negatives"
    return None


def hold(combinations: list[tuple[str, ...]]) -> None:
    for values in combinations:
        found, refused = outcome(values), expected(values)
        if refused is None:
            assert found == "ran", values
        else:
            assert found.startswith(f"{refused}: "), values
            assert found.endswith("."), values
            assert ". " not in found, values
            assert "\n" not in found, values


def test_every_choice_occurs_in_the_quick_part() -> None:
    for group, choices in enumerate(CHOICES.values()):
        assert {values[group] for values in SOME} == set(choices)


@pytest.mark.filterwarnings("ignore:The smallest of the")
def test_some_combinations() -> None:
    hold(SOME)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The smallest of the")
@pytest.mark.parametrize("method", CHOICES["method"])
def test_every_combination(method: str) -> None:
    hold([values for values in EVERY if values[0] == method])
