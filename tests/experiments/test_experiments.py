"""Every method has a recipe; it can be built, and carries the numbers that were published."""

from functools import cache

import pytest
from support.tiny import composed
from support.toys import METHODS

from icl_msr.cli.assemble import make_optimization
from icl_msr.core.config import Settings, build, check, config_dir

CIFAR10 = sorted(file.stem for file in (config_dir() / "experiment" / "cifar10").glob("*.yaml"))

RATES = {
    # ICL-MSR's small-image tables, which use W-MSE's recipe
    "simclr": (512, 3e-3),
    "byol": (512, 3e-3),
    "wmse": (256, 3e-3),  # four views
    "ressl": (512, 3e-3),
    "lmcl": (512, 3e-3),
    "ssl_hsic": (512, 3e-3),
    "relic": (512, 3e-3),
    # solo-learn
    "moco": (256, 0.3),
    "moco_v3": (256, 0.3),
    "simsiam": (256, 0.5 / 2),  # our loss is twice as large
    "barlow_twins": (256, 0.3),
    "vicreg": (256, 0.3),
    "nnclr": (256, 0.4),
    "swav": (256, 0.6),
    "dino": (256, 0.3),
    # lightly
    "dcl": (512, 0.06 * 512 / 128),
    # the authors' code
    "debiased": (256, 1e-3),
    "cmc": (256, 0.03),
    "supcon": (1024, 0.5),
    # ours
    "supervised": (128, 0.1),
    "random": (256, 3e-3),
}
"""Images of a batch, and the learning rate after warm-up."""

MSR = {"simclr_msr": 1.0, "byol_msr": 0.1, "lmcl_msr": 0.1, "ressl_msr": 0.01}
"""Lambda in ICL-MSR's small-image tables; gamma is 1 in all of them."""


@cache
def recipe(name: str) -> Settings:
    return check(composed(f"experiment=cifar10/{name}"))


def test_every_method_has_a_recipe() -> None:
    assert sorted(RATES) == METHODS
    assert sorted([*METHODS, *MSR, "any", "any_lars", "hcl", "moco_patch"]) == CIFAR10


@pytest.mark.parametrize("name", CIFAR10)
def test_a_recipe_can_be_built(name: str) -> None:
    settings = recipe(name)
    assert settings.dataset["_target_"].endswith(".cifar10")
    assert settings.backbone["name"] == "resnet18"
    method = build(
        settings.method,
        backbone=build(settings.backbone, image_size=32),
        classes=10,
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    fewest, most = method.takes
    assert fewest <= len(build(settings.augment).views) <= most
    assert (
        build(settings.regularizer, channels=method.channels, method_temperature=method.temperature) is not None
    ) == (name in MSR)
    assert (build(settings.negatives) is not None) == (name == "moco_patch")
    epoch = 50_000 // settings.loader.batch_size
    optimizer, _ = make_optimization(settings).build(
        method, settings.loader.batch_size, epoch * settings.trainer["max_epochs"], epoch
    )
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {parameter for parameter in method.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_rates_are_those_published(name: str) -> None:
    settings = recipe(name)
    batch, rate = RATES[name]
    assert settings.loader.batch_size == batch
    assert make_optimization(settings).effective_lr(batch) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_of_its_method(name: str) -> None:
    assert recipe(name).method["_target_"] == check(composed(f"method={name}")).method["_target_"]


@pytest.mark.parametrize("name", MSR)
def test_an_msr_recipe_is_its_method_with_the_papers_lambda_and_gamma(name: str) -> None:
    settings, plain = recipe(name).model_dump(), recipe(name.removesuffix("_msr")).model_dump()
    regularizer = settings.pop("regularizer")
    assert (regularizer["lam"], regularizer["gamma"], regularizer["n"], regularizer["u"]) == (MSR[name], 1.0, 6, 2.0)
    assert settings == {key: value for key, value in plain.items() if key != "regularizer"}


def test_patch_negatives_are_all_that_is_added_to_moco() -> None:
    settings, plain = recipe("moco_patch").model_dump(), recipe("moco").model_dump()
    assert settings.pop("negatives")["alpha"] == 2.0
    assert plain.pop("negatives") == {"_target_": None}
    assert settings == plain


@pytest.mark.parametrize("name", ["simclr", "byol", "wmse", "ressl", "lmcl", "ssl_hsic", "relic"])
def test_the_small_image_recipe_is_inherited(name: str) -> None:
    settings = recipe(name)
    assert (settings.method["hidden_dim"], settings.method["embedding_dim"]) == (1024, 64)
    assert settings.method.get("temperature", 0.5) == (0.1 if name == "ressl" else 0.5)
    assert settings.trainer["max_epochs"] == 1000
    assert settings.optimizer == settings.optimizer | {"_target_": "torch.optim.Adam", "weight_decay": 1e-6}
    drops = {"warmup_steps": 500, "drop_at": [50, 25], "drop_factor": 0.2}
    assert settings.schedule == settings.schedule | {"_target_": "icl_msr.training.optimization.drops", **drops}
    weak = {"jitter_probability": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0}
    assert settings.augment["views"] == {"ressl": [{}, weak], "wmse": [{}] * 4}.get(name, [{}, {}])
    drawn = {"scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "gray": 0.1, "blur": 0.0}
    assert settings.augment == settings.augment | drawn


@pytest.mark.parametrize("name", ["moco", "moco_v3", "simsiam", "barlow_twins", "vicreg", "nnclr", "swav", "dino"])
def test_solo_learns_schedule_is_inherited(name: str) -> None:
    settings = recipe(name)
    assert settings.trainer["max_epochs"] == 1000
    optimizer, schedule = settings.optimizer, settings.schedule
    cosine = {"_target_": "icl_msr.training.optimization.cosine", "warmup_epochs": 10.0, "scale_lr": "linear"}
    assert schedule == schedule | cosine
    plain = name in ("moco", "simsiam")
    assert optimizer["_target_"] == ("torch.optim.SGD" if plain else "timm.optim.Lars")
    assert settings.bias_and_norm == ({} if plain else {"weight_decay": 0.0, "always_adapt": False})
    assert plain or (optimizer["trust_coeff"], optimizer["trust_clip"]) == (0.02, True)


@pytest.mark.parametrize("name", ["any_lars", "moco_v3", "barlow_twins", "nnclr", "dino"])
def test_byols_views_are_inherited(name: str) -> None:
    augment = recipe(name).augment
    drawn = {"scale": [0.08, 1.0], "jitter": [0.4, 0.4, 0.2, 0.1], "gray": 0.2, "blur": 0.0, "solarize": 0.0}
    assert augment == augment | drawn | {"views": [{}, {"solarize": 0.2}]}
