"""Every choice in conf/ fits the code it names, and whatever does not fit is refused in one sentence."""

import inspect
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveFloat, PositiveInt
from support.tiny import composed

from icl_msr.cli.sweeps import ProcessLauncher
from icl_msr.core.config import build, check, config_dir, fingerprint, suggestion
from icl_msr.core.errors import UserError

FILES = sorted(file.relative_to(config_dir()) for file in config_dir().glob("*/**/*.yaml"))
OURS = [file for file in FILES if file.parts[0] != "hydra"]
CHOICES = [f"{file.parts[0]}={file.relative_to(file.parts[0]).with_suffix('')}" for file in OURS]
MANDATORY = {
    "dataset=arrays": ["dataset.path=images.npz"],
    "dataset=coco": ["dataset.root=coco"],
    "dataset=imagefolder": ["dataset.root=images"],
    "backbone=timm": ["backbone.name=resnet18"],
    "negatives=cached": ["negatives.folder=textures"],
    "evaluation=shape": ["evaluation.stimuli=stimuli"],
    "evaluation=similarity": ["evaluation.other=timm:resnet18"],
}
GROUPS = ["augment", "backbone", "dataset", "evaluation", "hardware", "logger", "method", "negatives", "optimizer"]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_fits_its_target(choice: str) -> None:
    settings = check(composed(choice, *MANDATORY.get(choice, [])))
    for node in settings.groups().values():
        if node["_target_"] is None:
            continue
        keywords = [
            p for p in inspect.signature(resolve_name(node["_target_"])).parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
        assert {p.name for p in keywords} == node.keys() - {"_target_"}
        # One place for every default: the YAML files. Where Python has one too, it is the same.
        assert all(p.default is p.empty or p.default == node[p.name] for p in keywords), node["_target_"]


def test_there_are_choices_of_every_group() -> None:
    groups = check(composed()).groups()
    assert groups.keys() == {"regularizer", *GROUPS}
    assert groups.keys() <= {file.parts[0] for file in OURS} <= groups.keys() | {"experiment"}


@pytest.mark.parametrize(("choice", "target"), [("process", ProcessLauncher), ("serial", BasicLauncher)])
def test_launchers_fit_their_targets_too(choice: str, target: type) -> None:
    assert {str(file) for file in FILES if file not in OURS} == {
        "hydra/launcher/process.yaml",
        "hydra/launcher/serial.yaml",
    }
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = [f"hydra/launcher={choice}"]
        launcher = compose("config", overrides=words, return_hydra_config=True).hydra.launcher
    assert issubclass(resolve_name(launcher._target_), Launcher)
    parameters = inspect.signature(target).parameters.values()
    assert {p.name for p in parameters} == launcher.keys() - {"_target_"}
    assert all(p.default is p.empty for p in parameters)


@pytest.mark.parametrize("file", [config_dir() / file for file in FILES], ids=map(str, FILES))
def test_every_file_says_what_it_is(file: Any) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")


def component(
    images: int,
    *,
    rate: PositiveFloat,
    count: PositiveInt | None,
    share: Annotated[float, Field(ge=0, le=1)],
    kind: Literal["small", "large"],
    name: str | list[str],
    layout: bool | Literal["auto"],
    sizes: Annotated[list[PositiveInt], Field(min_length=2, max_length=3)],
    options: dict[str, Any],
) -> dict[str, Any]:
    return {"images": images} | locals()


def other(*, size: PositiveInt) -> int:
    return size


KEYS: dict[str, Any] = {
    "_target_": f"{__name__}.component",
    "rate": 0.1,
    "count": None,
    "share": 0.5,
    "kind": "small",
    "name": "a",
    "layout": "auto",
    "sizes": [1, 2],
    "options": {},
}


def checked(**changes: Any) -> Any:
    config = composed()
    config.method = {**KEYS, **changes}
    return check(config)


def test_what_fits_is_built() -> None:
    for changes in ({}, {"count": 3}, {"name": ["a", "b"]}, {"layout": False}, {"rate": 1}, {"options": {"a": 1}}):
        node = checked(**changes).method
        built = build(node, 7)
        assert built["images"] == 7
        assert {name: built[name] for name in node if name != "_target_"} == {
            name: value for name, value in {**KEYS, **changes}.items() if name != "_target_"
        }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rate": 0}, "method.rate=0 is not allowed; it should be greater than 0."),
        ({"rate": "1e-3x"}, 'method.rate="1e-3x" is not allowed; it should be a number.'),
        ({"rate": True}, "method.rate=true is not allowed; it should be a number."),
        ({"rate": float("inf")}, "method.rate=Infinity is not allowed; it should be a finite number."),
        ({"rate": float("nan")}, "method.rate=NaN is not allowed; it should be a finite number."),
        ({"rate": None}, "method.rate=null is not allowed; it should be a number."),
        ({"count": 1.5}, "method.count=1.5 is not allowed; it should be a whole number or null."),
        ({"count": 0}, "method.count=0 is not allowed; it should be greater than 0 or null."),
        ({"count": "3"}, 'method.count="3" is not allowed; it should be a whole number or null.'),
        ({"share": 2}, "method.share=2 is not allowed; it should be at most 1."),
        ({"share": -0.1}, "method.share=-0.1 is not allowed; it should be at least 0."),
        ({"kind": "smal"}, 'method.kind="smal" is not allowed; it should be small or large.'),
        ({"name": 3}, "method.name=3 is not allowed; it should be text or a list like [1, 2]."),
        ({"name": ["a", 3]}, "method.name.1=3 is not allowed; it should be text."),
        ({"layout": "maybe"}, 'method.layout="maybe" is not allowed; it should be true or false or auto.'),
        ({"sizes": [1]}, "method.sizes=[1] is not allowed; it should be a list of 2 or more."),
        ({"sizes": [1, 2, 3, 4]}, "method.sizes=[1, 2, 3, 4] is not allowed; it should be a list of 3 or fewer."),
        ({"sizes": [1, "a"]}, 'method.sizes.1="a" is not allowed; it should be a whole number.'),
        ({"sizes": 3}, "method.sizes=3 is not allowed; it should be a list like [1, 2]."),
        ({"options": 3}, "method.options=3 is not allowed; it should be a mapping like {a: 1}."),
        ({"knid": "small"}, "method.knid is not a key of component; did you mean kind?"),
        ({"_target_": "no.such"}, "method._target_=no.such cannot be imported"),
        ({"_target_": None}, "method is none and has no keys, so method.rate has no meaning"),
        ({"_target_": f"{__name__}.other"}, "method.size is missing; add method.size=<value>."),
        ({"_target_": f"{__name__}.other", "size": 3}, "method.rate is not a key of other; choose one of size."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        checked(**changes)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_missing_keys_are_named() -> None:
    config = composed()
    OmegaConf.set_struct(config, False)
    del config.method.temperature
    del config.regularizer
    with pytest.raises(UserError, match=r"^regularizer is missing; add regularizer=<value>\.$"):
        check(config)
    config = composed("dataset=arrays")
    with pytest.raises(UserError, match=r"^dataset.path has no value yet; add dataset.path=<value>\.$"):
        check(config)
    config = composed("method.temperature=${nothing}")
    with pytest.raises(UserError, match=r"^method.temperature cannot be filled in .*nothing.*; name a key in full"):
        check(config)


def test_equal_configs_have_equal_fingerprints() -> None:
    first = fingerprint(check(composed()))
    assert first == fingerprint(check(composed("method=moco", "seed=0")))
    assert first == fingerprint(check(DictConfig(OmegaConf.create(OmegaConf.to_yaml(composed())))))
    turned = composed()
    turned.method = dict(reversed(turned.method.items()))
    assert first == fingerprint(check(turned))
    assert first != fingerprint(check(composed("seed=1")))
    assert first != fingerprint(check(composed("regularizer.lam=0.5")))


def test_suggestions() -> None:
    assert suggestion("temprature", ["temperature", "momentum"]) == "did you mean temperature?"
    assert suggestion("x", ["temperature", "momentum"]) == "choose one of momentum, temperature."
    assert suggestion("x", []) == "there is nothing to choose from."
