"""Random command lines of every command, from the groups, the keys and the types that the config has today.

A line is half meant and half hostile: choices and values near the defaults, and what a user, a script or an enemy may
type in their place.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from random import Random
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from support.tiny import DATA

from icl_msr.core.config import GIVEN, config_dir

SMALL = [*DATA, "loader.batch_size=8", "schedule.warmup_steps=0", "evaluation=light", "logger=csv", "hardware=cpu"]
TRAINING = ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
PHOTOS = [["dataset=imagefolder", "dataset.root=photos"], ["dataset=arrays", "dataset.path=arrays.npz"]]
DOORS = {"run": 56, "evaluate": 22, "textures": 4, "export": 9, "report": 9}
"""The commands, and how often each is tried, in percent."""

FOLDERS = (
    *("run", "run", "run", "empty", "file", "nowhere", "damaged", "photos", "run/checkpoints", "run/config.yaml", ""),
    *("a b", "exp [final]", ":smile:", "é", "../up", "~/up", "~", "/proc/self/x", "/dev/null", "s3://bucket/x"),
    *("x" * 300, "a,b", "a=b", "$HOME", "${nothing}", "-x", "\udcff", "a\nb"),
)
BY_TYPE: dict[type, Sequence[str]] = {
    int: (
        "0",
        "-1",
        "1",
        "2",
        "7",
        "4294967296",
        "9223372036854775808",
        "1" + "0" * 30,
        "1e3",
        "1.5",
        "²",
        "٣",
        "0x10",
    ),
    float: ("0", "-1", "0.5", "1", "2", "1e-45", "1e308", "nan", "inf", "-inf", "1e999", "1_000", "1,5"),
    bool: ("true", "false", "yes", "1"),
    str: ("''", "a", "é", "'a b'", "[final]", "[/]", "../x", "/dev/null", "s3://b/k", "${seed}", "${nothing}", "$HOME"),
    list: ("[]", "[1]", "[1,2]", "[-1,1]", "[2,1]", "[null]", "[[[]]]", "[a,b]", "[{}]", "[nan]"),
    dict: (
        "{}",
        "{a:1}",
        "{a:{b:null}}",
        "{_target_:builtins.int}",
        "{_target_:builtins.object}",
        "{_target_:nowhere.X}",
    ),
    NoneType: ("null", "None", "", "???", "0,1", "range(2)", "range(9,1)", "choice(a,b)", "glob(*)", "${oc.env:HOME}"),
}
LITTER = (
    *(
        "",
        "=",
        "a",
        "a=b=c",
        "seed = 3",
        "seed=0 ",
        "@",
        "+",
        "~",
        "~~",
        "++",
        "-",
        "--",
        "{}",
        "a.b.c.d=1",
        "+a.b.c=1",
    ),
    *("seed[0]=1", "x" * 5000, "é=1", "²=1", "seed=" + "9" * 5000, "seed=" + "[" * 200, "%s=%s", "\udcff=1", "a\nb=1"),
    *(
        "trust=torch",
        "trust=",
        "trust=os",
        "resume=",
        "seed=1",
        "seed=2",
        "experiment=cifar10/any",
        "metric=online/knn",
    ),
    *("+logger.x._target_=builtins.object", "method@x=moco", "+augment@x=small", "~logger", "~callbacks.online"),
)
FLAGS = (
    *("-m", "-m", "-m", "--multirun", "--help", "--hydra-help", "--version", "--cfg", "--cfg=job", "--resolve", "-sc"),
    *("--info", "--info=x", "--package=x", "--config-name=x", "--config-dir=x", "--config-path=x", "--foo", "-x", "-h"),
)
HYDRAS = (
    *(
        "hydra/launcher=process",
        "hydra.launcher=null",
        "hydra.launcher.jobs=0",
        "hydra.launcher.jobs=a",
        "hydra.mode=X",
    ),
    *("hydra.sweeper=null", "hydra.sweeper.max_batch_size=0", "hydra.job.chdir=true", "hydra.verbose=x", "hydra=null"),
    *("hydra.run=null", "hydra.output_subdir=x", "hydra.searchpath=[x]", "hydra.job.name=null", "hydra/help=x"),
    *("hydra.callbacks=null", "hydra.sweep.subdir=..", "hydra.sweep.subdir=''", "hydra.job.env_set={A:1}"),
)


@dataclass(frozen=True)
class Line:
    """A command and its words."""

    door: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([f"icl_msr.{self.door}", *map(repr, self.words)])


@dataclass(frozen=True)
class Key:
    """A key of the config, its value in the YAML file if it is listed there, and the annotation of the parameter."""

    name: str
    default: Any
    annotation: Any
    listed: bool = True


class Grammar:
    """Draws command lines. The same seed gives the same lines."""

    def __init__(self, seed: int):
        self.random = Random(seed)
        self.choices: dict[str, list[str]] = {}
        self.keys: dict[str, list[Key]] = {}
        """The keys of each choice, such as `method=moco`."""
        for file in sorted(config_dir().glob("*/*.yaml")):
            group, choice = file.parent.name, file.stem
            self.choices.setdefault(group, []).append(choice)
            content = yaml.safe_load(file.read_text())
            node = content.get(group, content) if "@package _global_" in file.read_text() else content
            named = node.items() if group == "callbacks" else [("", node)]
            prefixes = {"callbacks": "callbacks.{}.", "evaluation": "evaluation."}
            self.keys[f"{group}={choice}"] = [
                key
                for name, part in named
                for key in keys_of(part or {}, group, prefixes.get(group, f"{group}.").format(name))
            ]
        self.roots = [Key("seed", 0, int), Key("metric", "auto", str), Key("loader.batch_size", 8, int)]
        self.roots += [Key("loader.num_workers", 0, int), Key("bias_and_norm", {}, dict)]

    def line(self) -> Line:
        """Draw the line of any command."""
        (door,) = self.random.choices(list(DOORS), list(DOORS.values()))
        return Line(door, tuple(getattr(self, door)()))

    def meant(self) -> Line:
        """Draw the line of a run that somebody could mean: choices that exist, and values near the defaults."""
        groups = self.random.sample([g for g in self.choices if g not in ("dataset", "hardware", "logger")], 4)
        chosen = [f"{group}={self.random.choice(self.choices[group])}" for group in groups]
        chosen = [choice for choice in chosen if all(key.default != "???" for key in self.keys[choice])]
        data = self.random.choice([[], [], *PHOTOS])
        keys = [key for choice in chosen for key in self.keys[choice] if key.listed]
        values = [f"{key.name}={self.near(key)}" for key in self.random.sample(keys, min(len(keys), 3))]
        return Line("run", (*small(data), *chosen, *data, *values))

    def run(self) -> list[str]:
        """Draw the words of a run: a meant line, spoilt by a few words."""
        meant = self.random.random() < 0.5
        words = [*self.meant().words, *self.words(1)] if meant else [*SMALL, *self.words(self.random.randint(1, 4))]
        if self.random.random() < 0.15:
            words = [f"resume={self.folder()}", *words[len(words) - self.random.randint(0, 2) :]]
        return words

    def evaluate(self) -> list[str]:
        """Draw the words of an evaluation."""
        sources = [f"run={self.folder()}", f"checkpoint={self.folder()}/checkpoints/last.ckpt"]
        sources += [f"encoder={self.folder()}/encoder.safetensors", "encoder=timm:test_vit weights=null"]
        sources += ["encoder=torchvision:resnet18 weights=null", "encoder=timm:", "encoder=x:y", "encoder=é", ""]
        beside = [f"to={self.folder()}", f"cache={self.folder()}", "weights=null", "weights=file", *self.words(3)]
        return [*self.random.choice(sources).split(), *DATA, *self.random.sample(beside, self.random.randint(0, 4))]

    def textures(self) -> list[str]:
        """Draw the words of a folder of textures."""
        return [*DATA, *self.words(self.random.randint(0, 3)), *self.options(("--to",), 0.9)]

    def export(self) -> list[str]:
        """Draw the words of an export."""
        words = [self.folder()] if self.random.random() < 0.9 else self.words(2)
        return [*words, *self.options(("--to", "--encoder", "--overwrite", "trust=torch", "--encoder=momentum"), 0.3)]

    def report(self) -> list[str]:
        """Draw the words of a report."""
        folders = [self.folder() for _ in range(self.random.randint(0, 3))]
        return [*folders, *self.options(("--out", "--against", "--foo", *self.words(1)), 0.3)]

    def options(self, names: Sequence[str], often: float) -> list[str]:
        """Draw options, those without a value and an equals sign with a folder."""
        taken = [name for name in names if self.random.random() < often]
        return [part for name in taken for part in ([name] if "=" in name else [name, self.folder()])]

    def folder(self) -> str:
        """Draw a folder."""
        return self.random.choice(FOLDERS)

    def words(self, count: int) -> list[str]:
        """Draw words of any kind, most of them a key with a value."""
        kinds = {self.set: 10, self.choose: 4, self.litter: 2, self.flag: 1, self.hydra: 2}
        return [kind() for kind in self.random.choices(list(kinds), list(kinds.values()), k=count)]

    def set(self) -> str:
        """Draw a key and a value, a key that is added, or one that is removed."""
        key = self.random.choice([*self.roots, *self.random.choice(list(self.keys.values()))])
        sign = self.random.choice(["", "", "", "", "+", "++", "~"])
        value = self.near(key) if self.random.random() < 0.4 else self.hostile(key)
        if self.random.random() < 0.1:
            value = f"{value},{self.near(key)}"
        return f"{sign}{key.name}" if sign == "~" else f"{sign}{key.name}={value}"

    def choose(self) -> str:
        """Draw a choice of a group."""
        group = self.random.choice(list(self.choices))
        names = [*self.choices[group], *self.choices[group], *BY_TYPE[NoneType], "moco", "é", "[a,b]", "a/b"]
        return f"{group}={self.random.choice(names)}"

    def litter(self) -> str:
        """Draw what is hardly a word."""
        return self.random.choice(LITTER)

    def flag(self) -> str:
        """Draw one of Hydra's options."""
        return self.random.choice(FLAGS)

    def hydra(self) -> str:
        """Draw a word that Hydra reads for itself."""
        places = [
            f"hydra.run.dir={self.folder()}",
            f"hydra.sweep.dir={self.folder()}",
            f"dataset.cache={self.folder()}",
        ]
        return self.random.choice([*HYDRAS, *places, *places])

    def near(self, key: Key) -> str:
        """Draw a value that the annotation allows, or one near the default."""
        values: list[Any] = [key.default]
        if isinstance(key.default, bool):
            values.append(not key.default)
        elif isinstance(key.default, int | float):
            values += [key.default * 2, type(key.default)(key.default / 2), key.default + 1]
        values += literals(key.annotation)
        return as_word(self.random.choice(values))

    def hostile(self, key: Key) -> str:
        """Draw a value of the type of the default, or of any type."""
        kinds = [type(key.default), type(key.default), *BY_TYPE]
        return self.random.choice(BY_TYPE[self.random.choice(kinds)])


def small(data: Sequence[str]) -> list[str]:
    """Return the words of a small run on the embedded data set, or on the data that other words name."""
    return [word for word in SMALL if not (data and word.startswith("dataset."))]


def keys_of(node: dict[str, Any], group: str, prefix: str) -> list[Key]:
    """Return the keys of a node, and the parameters of its target that the file does not list."""
    target = node.get("_target_")
    parameters = inspect.signature(resolve_name(target)).parameters if target else {}
    given = {"defaults", "_target_", "args", "kwargs", *GIVEN.get(group, ())}
    values = {**dict.fromkeys(parameters), **node}
    annotations = {name: parameter.annotation for name, parameter in parameters.items()}
    return [Key(prefix + k, v, annotations.get(k), k in node) for k, v in values.items() if k not in given]


def literals(annotation: Any) -> list[Any]:
    """Return the values that an annotation lists."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return list(arguments)
    return [value for part in arguments if origin is not Annotated or part is arguments[0] for value in literals(part)]


def as_word(value: Any) -> str:
    """Return a plain value as Hydra's grammar writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{as_word(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_word, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
