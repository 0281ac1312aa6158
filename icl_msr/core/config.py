"""From composed YAML to checked objects.

One rule carries the whole schema: a node names a class or function in `_target_`; that target's keyword-only
parameters, with their annotations, are the node's keys, and its positional parameters are handed over by the program.
So the schema of a component stands in the component, and a user's own package needs nothing more. What has no
component (the root, the trainer) is declared here.
"""

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
)
from pydantic.fields import FieldInfo

from icl_msr.core.errors import UserError

Schema = TypeVar("Schema", bound=BaseModel)
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Trainer(BaseModel):
    """How long and how often; handed to Lightning's Trainer."""

    model_config = _STRICT

    max_epochs: PositiveInt
    accumulate_grad_batches: PositiveInt
    gradient_clip_val: PositiveFloat | None
    log_every_n_steps: PositiveInt
    limit_train_batches: PositiveInt | None
    checkpoint_every_n_epochs: PositiveInt
    checkpoint_every_n_minutes: PositiveFloat | None
    online_every_n_epochs: NonNegativeInt


class Loader(BaseModel):
    """Batches."""

    model_config = _STRICT

    batch_size: Annotated[int, Field(ge=2)]
    num_workers: NonNegativeInt


class Settings(BaseModel):
    """The root of a config: one node a group, and a few values of its own."""

    model_config = _STRICT

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    metric: str
    trainer: Trainer
    loader: Loader
    dataset: dict[str, Any]
    backbone: dict[str, Any]
    method: dict[str, Any]
    regularizer: dict[str, Any]
    negatives: dict[str, Any]
    augment: dict[str, Any]
    optimizer: dict[str, Any]
    hardware: dict[str, Any]
    logger: dict[str, Any]
    evaluation: dict[str, Any]

    def groups(self) -> dict[str, dict[str, Any]]:
        """The nodes that name a target."""
        return {name: node for name, node in self if isinstance(node, dict)}


def config_dir() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def check(config: DictConfig) -> Settings:
    """Checks every key, type and range of a composed config before anything is built.

    Raises:
        UserError: one sentence with the key, what is wrong, and the nearest valid name or the allowed values.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{missing[0]} has no value yet; add {missing[0]}=<value>.")
        plain = OmegaConf.to_container(config, resolve=True)
    except InterpolationResolutionError as error:
        raise UserError(unfilled(error)) from None
    assert isinstance(plain, dict)
    settings = _validated(Settings, {str(key): value for key, value in plain.items()}, "")
    for name, node in settings.groups().items():
        check_node(name, node)
    return settings


def build(node: Mapping[str, Any], *handed_over: Any) -> Any:
    """Calls a checked node's target; None where `_target_` is null.

    A target takes as many of the things handed over as it has positional parameters.
    """
    if node["_target_"] is None:
        return None
    keys = {name: value for name, value in node.items() if name != "_target_"}
    target = resolve_name(node["_target_"])
    kinds = [p.kind for p in inspect.signature(target).parameters.values()]
    taken = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return target(*handed_over[:taken], **keys)


def fingerprint(settings: Settings) -> str:
    """A short hash of all values: equal for equal configs."""
    text = json.dumps(settings.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def unfilled(error: InterpolationResolutionError) -> str:
    """What is said of a value that refers to nothing."""
    reason = str(error).splitlines()[0]
    return f"{error.full_key} cannot be filled in ({reason}); name a key in full, as ${{seed}}."


def no_keys(group: str, wrong: str) -> str:
    """What is said of a key of a group that is `none`."""
    return f"{group} is none and has no keys, so {wrong} has no meaning; drop it or choose another {group}."


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """`did you mean a or b?`, or all known names where none is near."""
    names = sorted(known)
    if not names:
        return "there is nothing to choose from."
    near = difflib.get_close_matches(wrong, names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}."


def check_node(group: str, node: Mapping[str, Any]) -> None:
    """Holds the keys of a group against what its `_target_` takes.

    Raises:
        UserError: a key is missing, unknown, or has a value that is not allowed.
    """
    if "_target_" not in node:
        raise UserError(f"{group} names no _target_; choose one of the group's YAML files, {group}=<name>.")
    keys = {name: value for name, value in node.items() if name != "_target_"}
    if node["_target_"] is None:
        if keys:
            raise UserError(no_keys(group, f"{group}.{next(iter(keys))}"))
        return
    try:
        target = resolve_name(node["_target_"])
    except Exception as error:
        raise UserError(f"{group}._target_={node['_target_']} cannot be imported ({error}).") from None
    _validated(_schema(target), keys, f"{group}.")


def _schema(target: Callable[..., Any]) -> type[BaseModel]:
    parameters = inspect.signature(target, eval_str=True).parameters.values()
    fields: dict[str, Any] = {
        p.name: (
            Any if p.annotation is p.empty else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(target.__name__, __config__=_STRICT, **fields)


def _validated(schema: type[Schema], values: Mapping[str, Any], prefix: str) -> Schema:
    try:
        return schema(**values)
    except ValidationError as errors:
        raise UserError(_sentence(errors, schema, values, prefix)) from None


def _sentence(errors: ValidationError, schema: type[BaseModel], values: Mapping[str, Any], prefix: str) -> str:
    """The first mistake, said of its key. The members of a union, which pydantic judges one by one, are one choice."""
    first = errors.errors()[0]
    if first["type"] == "missing":
        key = prefix + ".".join(map(str, first["loc"]))
        return f"{key} is missing; add {key}=<value>."
    found = [(_path(error["loc"], values), error) for error in errors.errors()]
    path, error = max((pair for pair in found if pair[0][0] == found[0][0][0]), key=lambda pair: len(pair[0]))
    key, fields = prefix + ".".join(map(str, path)), _fields(schema, path)
    if error["type"] == "extra_forbidden":
        owner = f" of {schema.__name__}" if prefix else ""
        return f"{key} is not a key{owner}; {suggestion(str(path[-1]), fields)}"
    value: Any = values
    for part in path:
        value = value[part]
    shown = json.dumps(value, default=str)
    if error["type"] == "value_error":
        return f"{key}={shown} is not allowed: {error['ctx']['error']}."
    allowed = [_allowed(other) for where, other in found if where == path]
    if path[-1] in fields and NoneType in get_args(fields[path[-1]].annotation):
        allowed.append("null")
    wrong = json.dumps(error["input"], default=str)
    subject = "it" if wrong == shown else wrong
    return f"{key}={shown} is not allowed; {subject} should be {' or '.join(dict.fromkeys(allowed))}."


def _path(loc: Iterable[int | str], values: Any) -> list[Any]:
    """Where the value stands: pydantic's own path also names the types of a union that it tried."""
    path: list[Any] = []
    for part in loc:
        inside = range(len(values)) if isinstance(values, list) else values if isinstance(values, Mapping) else ()
        if part in inside:
            path.append(part)
            values = values[part]
    return path


def _fields(schema: type[BaseModel], path: Sequence[Any]) -> Mapping[str, FieldInfo]:
    """The fields beside the last name of a path; none inside a value that is no model."""
    fields = schema.model_fields
    for name in path[:-1]:
        fields = getattr(fields[name].annotation, "model_fields", {}) if name in fields else {}
    return fields


_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list like [1, 2]",
    "dict_type": "a mapping like {{a: 1}}",
    "model_type": "a mapping like {{a: 1}}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
}


def _allowed(error: Mapping[str, Any]) -> str:
    """What a value should be, in plain words."""
    words = _ALLOWED.get(error["type"], "")
    return words.format(**error.get("ctx", {})) or str(error["msg"]).removeprefix("Input should be ").replace("'", "")
