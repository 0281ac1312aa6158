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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
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

from icl_msr.errors import UserError

Schema = TypeVar("Schema", bound=BaseModel)
_STRICT = ConfigDict(extra="forbid", strict=True)


class Trainer(BaseModel):
    """How long and how often; handed to Lightning's Trainer."""

    model_config = _STRICT

    max_epochs: PositiveInt
    accumulate_grad_batches: PositiveInt
    gradient_clip_val: PositiveFloat | None
    log_every_n_steps: PositiveInt
    limit_train_batches: PositiveInt | None
    checkpoint_every_n_epochs: PositiveInt
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
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def check(config: DictConfig) -> Settings:
    """Checks every key, type and range of a composed config before anything is built.

    Raises:
        UserError: one sentence with the key, what is wrong, and the nearest valid name or the allowed values.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} has no value yet; add {missing[0]}=<value>.")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    settings = _validated(Settings, {str(key): value for key, value in plain.items()}, "")
    for name, node in settings.groups().items():
        _check_node(name, node)
    return settings


def build(node: Mapping[str, Any], *handed_over: Any) -> Any:
    """Calls a checked node's target; None where `_target_` is null."""
    if node["_target_"] is None:
        return None
    keys = {name: value for name, value in node.items() if name != "_target_"}
    return get_object(node["_target_"])(*handed_over, **keys)


def fingerprint(settings: Settings) -> str:
    """A short hash of all values: equal for equal configs."""
    text = json.dumps(settings.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean a or b?`, or all known names where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}."


def _check_node(group: str, node: Mapping[str, Any]) -> None:
    if "_target_" not in node:
        raise UserError(f"{group} names no _target_; choose one of the group's YAML files, {group}=<name>.")
    keys = {name: value for name, value in node.items() if name != "_target_"}
    if node["_target_"] is None:
        if keys:
            raise UserError(f"{group} is none and has no keys, so {group}.{next(iter(keys))} has no meaning; drop it.")
        return
    try:
        target = get_object(node["_target_"])
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
        raise UserError(_sentence(errors, schema, prefix)) from None


def _sentence(errors: ValidationError, schema: type[BaseModel], prefix: str) -> str:
    error = errors.errors()[0]
    path = prefix + ".".join(str(part) for part in error["loc"] if not str(part).startswith(("function-", "literal")))
    kind = error["type"]
    if kind == "extra_forbidden":
        known = set(schema.model_fields)
        if len(error["loc"]) > 1:  # inside trainer or loader
            inner = schema.model_fields[str(error["loc"][0])].annotation
            known = set(getattr(inner, "model_fields", {}))
        owner = f" of {schema.__name__}" if prefix else ""
        return f"{path} is not a key{owner}; {suggestion(str(error['loc'][-1]), known)}"
    if kind == "missing":
        return f"{path} is missing; add {path}=<value>."
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{path}={error['input']!r} is not allowed; it should be {reason}."
