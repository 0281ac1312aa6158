"""Every choice in conf/ fits the code it names, and whatever does not fit is refused in one sentence."""

import inspect
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveFloat, PositiveInt
from support.tiny import composed

from icl_msr.cli.arrays import SlurmLauncher
from icl_msr.cli.sweeps import ProcessLauncher
from icl_msr.core.config import (
    GIVEN,
    OWNED,
    PLURAL,
    build,
    check,
    check_node,
    config_dir,
    fingerprint,
    suggestion,
    with_new_keys,
)
from icl_msr.core.errors import UserError

FILES = sorted(file.relative_to(config_dir()) for file in config_dir().glob("*/**/*.yaml"))
OURS = [file for file in FILES if file.parts[0] != "hydra"]
CHOICES = [f"{file.parts[0]}={file.relative_to(file.parts[0]).with_suffix('')}" for file in OURS]
MANDATORY = {
    "dataset=arrays": ["dataset.path=images.npz"],
    "dataset=coco": ["dataset.root=coco"],
    "dataset=imagefolder": ["dataset.root=images"],
    "dataset=images": ["dataset.root=images"],
    "dataset=imagenet9": ["dataset.root=images"],
    "dataset=tiny_imagenet": ["dataset.root=images"],
    "dataset=oxford_pets": ["dataset.root=images"],
    "dataset=wilds": ["dataset.root=images"],
    "dataset=huggingface": ["dataset.name=images"],
    "dataset=shards": ["dataset.url=shards"],
    "backbone=timm": ["backbone.name=resnet18"],
    "negatives=cached": ["negatives.folder=textures"],
    "evaluation=shape": ["evaluation.shape.stimuli=stimuli"],
    "evaluation=similarity": ["evaluation.similarity.other=timm:resnet18"],
    "experiment=negatives/texture": ["dataset.root=images", "negatives.folder=textures"],
}
FOLDERS = ("icl_msr/imagenet", "icl_msr/coco", "negatives/")
for choice in CHOICES:
    if choice.removeprefix("experiment=").startswith(FOLDERS):
        MANDATORY.setdefault(choice, ["dataset.root=images"])
GROUPS = ["augment", "backbone", "background", "callbacks", "dataset", "evaluation", "hardware", "logger", "method"]
GROUPS += ["hard_negatives", "negatives", "optimizer", "schedule", "trainer"]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_fits_its_target(choice: str) -> None:
    settings = check(composed(choice, *MANDATORY.get(choice, [])))
    for group, _, node in settings.nodes():
        if not (node["_target_"] or "").startswith("icl_msr."):
            continue
        parameters = inspect.signature(resolve_name(node["_target_"])).parameters.values()
        ours = [p for p in parameters if p.name not in GIVEN.get(group, ()) or p.name in node]
        assert {p.name for p in ours} == node.keys() - {"_target_"}
        # One place for every default: the YAML files. Where Python has one too, it is the same. A recipe changes some.
        recipe = choice.startswith("experiment=")
        assert recipe or all(p.default is p.empty or p.default == node[p.name] for p in ours), node["_target_"]


def test_every_argument_of_lightnings_trainer_is_a_key_or_owned() -> None:
    node = check(composed()).trainer
    arguments = inspect.signature(pl.Trainer).parameters.keys()
    assert arguments == (node.keys() - {"_target_"}) | OWNED["trainer"].keys()
    assert not node.keys() & OWNED["trainer"].keys()


@pytest.mark.parametrize("name", OWNED["trainer"])
def test_what_the_program_decides_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match=rf"^trainer\.{name} cannot be set, the program decides it: [^.]") as error:
        check(composed(f"+trainer.{name}=1"))
    assert OWNED["trainer"][name] in str(error.value)


def test_there_are_choices_of_every_group() -> None:
    groups = check(composed()).groups()
    assert groups.keys() == {"regularizer", *GROUPS}
    assert set(PLURAL) <= groups.keys()
    assert groups.keys() <= {file.parts[0] for file in OURS} <= groups.keys() | {"experiment", "sweep"}


LAUNCHERS = [("process", ProcessLauncher), ("serial", BasicLauncher), ("slurm", SlurmLauncher)]


@pytest.mark.parametrize(("choice", "target"), LAUNCHERS)
def test_launchers_fit_their_targets_too(choice: str, target: type) -> None:
    assert {str(file) for file in FILES if file not in OURS} == {
        "hydra/launcher/process.yaml",
        "hydra/launcher/serial.yaml",
        "hydra/launcher/slurm.yaml",
        "hydra/sweeper/optuna.yaml",
    }
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = [f"hydra/launcher={choice}"]
        launcher = compose("config", overrides=words, return_hydra_config=True).hydra.launcher
    assert issubclass(resolve_name(launcher._target_), Launcher)
    parameters = inspect.signature(target).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    keys = launcher.keys() - {"_target_"}
    assert names == keys if len(names) == len(parameters) else names < keys
    assert all(p.default is p.empty for p in parameters)


@pytest.mark.parametrize("file", [config_dir() / file for file in FILES], ids=map(str, FILES))
def test_every_file_says_what_it_is(file: Any) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")


def component(
    classes: int,
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
    return {"classes": classes} | locals()


def other(*, size: PositiveInt) -> int:
    return size


def foreign(a, size: "NoSuchType" = 3, flag: bool = None, shape: tuple[int, int] = (1, 2)) -> Any:  # type: ignore  # noqa
    """As libraries are: not annotated, for type checkers alone, wrongly, or with what no YAML file can hold."""
    return a, size, flag, shape


def anything(*, head: Any, **options: Any) -> Any:
    return head, options


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
        built = build(node, classes=7, mean=0.5)
        assert built["classes"] == 7
        assert {name: built[name] for name in node if name != "_target_"} == {
            name: value for name, value in {**KEYS, **changes}.items() if name != "_target_"
        }


def test_a_node_overrules_what_is_handed_over() -> None:
    assert build({**KEYS, "classes": 3}, classes=7)["classes"] == 3
    assert build({"_target_": f"{__name__}.other", "size": 3}, classes=7) == 3


def test_nodes_are_built_inside_of_values() -> None:
    """Nested, in lists and mappings, partial, with positional arguments."""
    inner = {"_target_": f"{__name__}.other", "size": 3}
    late = {"_target_": f"{__name__}.foreign", "_partial_": True, "flag": True}
    node = {"_target_": f"{__name__}.anything", "head": [inner, {"x": inner}], "late": late, "more": 1}
    check_node("method", node)
    head, options = build(node)
    assert head == [3, {"x": 3}]
    assert options["more"] == 1
    assert options["late"](1, size=2) == (1, 2, True, (1, 2))
    layers = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear", "_args_": [3, 4]}]}
    check_node("method.head", layers)
    assert [(layer.in_features, layer.out_features) for layer in build(layers)] == [(3, 4)]


def test_what_is_handed_over_does_not_reach_nested_nodes() -> None:
    node = {"_target_": f"{__name__}.anything", "head": {"_target_": f"{__name__}.anything", "head": 1}}
    assert build(node, classes=7) == ((1, {}), {})


FOREIGN = [
    ({"a": 1, "size": "x", "flag": None, "shape": [1, 2, 3]}, None),
    ({}, "method.a is missing; add method.a=<value>."),
    ({"a": 1, "flag": 3}, "method.flag=3 is not allowed; it should be true or false or null."),
    ({"a": 1, "szie": 3}, "method.szie is not a key of foreign; did you mean size?"),
    ({"a": 1, "b": 3}, "method.b is not a key of foreign; choose one of a, flag, shape, size."),
    ({"a": {"_target_": f"{__name__}.other"}}, "method.a.size is missing; add method.a.size=<value>."),
    ({"a": [{"_target_": f"{__name__}.other", "size": -1}]}, "method.a.0.size=-1 is not allowed; it should be greater"),
    ({"a": {"_target_": f"{__name__}.nothing"}}, f"method.a._target_={__name__}.nothing cannot be imported"),
]


@pytest.mark.parametrize(("keys", "sentence"), FOREIGN)
def test_foreign_targets_are_checked_by_their_signature(keys: dict[str, Any], sentence: str | None) -> None:
    node = {"_target_": f"{__name__}.foreign", **keys}
    if sentence is None:
        check_node("method", node)
    else:
        with pytest.raises(UserError) as error:
            check_node("method", node)
        assert str(error.value).startswith(sentence)
        assert "\n" not in str(error.value)


STOP = "pytorch_lightning.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["optimizer=sgd", "+optimizer.momentun=0.9"],
            "optimizer.momentun is not a key of SGD; did you mean momentum?",
        ),
        (["optimizer.lr=fast"], 'optimizer.lr="fast" is not allowed; it should be a number.'),
        (["+optimizer.eps=small"], 'optimizer.eps="small" is not allowed; it should be a number.'),
        (["+bias_and_norm.weight_decya=0"], "bias_and_norm.weight_decya is not a key of Adam; did you mean weight_dec"),
        (["++trainer.max_epoch=3"], "trainer.max_epoch is not a key of Trainer; did you mean max_epochs"),
        (["+callbacks.stop=3"], "callbacks.stop names no _target_; add callbacks.stop._target_=<class>."),
        ([f"+callbacks.stop={{_target_: {STOP}}}"], "callbacks.stop.monitor is missing"),
        (
            [f"+callbacks.stop={{_target_: {STOP}, monitor: a, patiense: 3}}"],
            "callbacks.stop.patiense is not a key of EarlyStopping; did you mean patience?",
        ),
        (["++logger.wandb.projet=x"], "logger.wandb.projet is not a key of WeightsAndBiases; did you mean project?"),
    ],
)
def test_classes_of_torch_and_lightning_are_checked_too(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check(composed(*words))
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_new_keys_of_a_saved_config() -> None:
    """At the root and where the target is the same; what was taken away stays away."""
    today = {
        "seed": 0,
        "loader": {"batch_size": 4, "num_workers": 2},
        "method": {"_target_": "a", "x": 1, "y": 2},
        "optimizer": {"_target_": "a", "lr": 1},
        "bias_and_norm": {"weight_decay": 0.0},
        "callbacks": {"online": {"_target_": "c", "n": 1, "m": 2}, "lines": {"_target_": "d"}},
        "schedule": {"_target_": "new"},
    }
    saved = {
        "seed": 5,
        "loader": {"batch_size": 8},
        "method": {"_target_": "a", "x": 3},
        "optimizer": {"_target_": "b"},
        "bias_and_norm": {},
        "callbacks": {"online": {"_target_": "c", "n": 7}, "mine": {"_target_": "e"}},
    }
    assert with_new_keys(saved, today) == {
        "seed": 5,
        "loader": {"batch_size": 8, "num_workers": 2},
        "method": {"_target_": "a", "x": 3, "y": 2},
        "optimizer": {"_target_": "b"},
        "bias_and_norm": {},
        "callbacks": {"online": {"_target_": "c", "n": 7, "m": 2}, "mine": {"_target_": "e"}},
        "schedule": {"_target_": "new"},
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
