"""Check composed YAML and build objects from it.

A node is a mapping that names a class or function in `_target_`. The parameters of the target are the keys of the node.
So a component defines its own schema, and a YAML file can name any class of torch, Lightning or a user's package. The
program passes some values by name (`GIVEN`). A target receives those that it declares, unless the node sets them
itself. Values may be nodes again, also in lists and mappings. `_partial_: true` gives a function that takes the
remaining arguments, as in `hydra.utils.instantiate`.

This module imports no target before it is asked to check or build one.
"""

import difflib
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import Parameter
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, create_model
from pydantic.fields import FieldInfo

from icl_msr.core.errors import UserError
from icl_msr.core.saved import leaves

Schema = TypeVar("Schema", bound=BaseModel)
Built = TypeVar("Built")
Node = dict[str, Any]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

PLURAL = ("callbacks", "logger", "evaluation")
"""Groups in which a run may choose several options. Each is a mapping from names to nodes."""

UNSEEN = ("loader.num_workers", "dataset.cache_gb", "hardware.requeue")
"""Keys that no result depends on, so that they may change when a run is continued."""

MOVABLE = ("dataset.root", "dataset.path", "hardware.devices", "hardware.nodes")
"""Keys that may change when a run is continued, because the images are compared, and ranks equal one process."""

GIVEN: dict[str, tuple[str, ...]] = {
    "method": ("backbone", "classes", "mean", "std"),
    "regularizer": ("channels", "method_temperature", "dataset"),
    "optimizer": ("params",),
    "schedule": ("optimizer", "total_steps", "steps_per_epoch", "global_batch"),
    "backbone": ("image_size",),
    "callbacks": ("dataset", "channels", "seed", "checkpoint", "throughput"),
    "logger": ("folder", "about", "save_dir"),
}
"""Values that the program passes to the targets of a group, by name."""

OWNED = {
    "trainer": {
        "accelerator": "type hardware.accelerator=<value>",
        "devices": "type hardware.devices=<number>",
        "num_nodes": "type hardware.nodes=<number>",
        "precision": "type hardware.precision=<value>",
        "strategy": "it follows from hardware.devices, and queues must not be broadcast between ranks",
        "sync_batchnorm": "statistics are always shared by all devices, with derivatives of every order",
        "use_distributed_sampler": "ranks share the batches that one device would see",
        "logger": "type logger=[wandb,tensorboard] or +logger.<name>._target_=<class>",
        "callbacks": "type +callbacks.<name>._target_=<class>",
        "enable_checkpointing": "drop the checkpoints with ~callbacks.checkpoints",
        "default_root_dir": "type hydra.run.dir=<folder>",
        "plugins": "checkpoints are written whole or not at all, by a plugin of the program",
        "barebones": "a run writes its results by callbacks and loggers",
    }
}
"""Arguments that the program sets itself, with the advice for the user."""


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that every generator takes: NumPy's has 32 bits."""


class Loader(BaseModel):
    """Settings of the data loader."""

    model_config = _STRICT

    batch_size: Annotated[int, Field(ge=2)]
    num_workers: NonNegativeInt
    block: PositiveInt | None = None
    whole_images: bool | None = None
    reduced_jpeg: bool = False
    sampler: Literal["uniform", "group_balanced"] = "uniform"


class Settings(BaseModel):
    """The root of a config: one or more nodes for each group, and a few values of its own.

    Groups are checked in this order. Those whose targets are imported fast come first.
    """

    model_config = _STRICT

    seed: Seed
    metric: str
    loader: Loader
    method: Node
    regularizer: Node
    optimizer: Node
    bias_and_norm: dict[str, Any]
    schedule: Node
    hardware: Node
    negatives: Node
    hard_negatives: Node
    augment: Node
    background: Node
    backbone: Node
    dataset: Node
    evaluation: dict[str, Any]
    trainer: Node
    callbacks: dict[str, Any]
    logger: dict[str, Any]

    def groups(self) -> dict[str, Node]:
        """Return all config groups by name."""
        return {name: value for name, value in self if isinstance(value, dict) and name != "bias_and_norm"}

    def nodes(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (group, key, node) for every node. A key is, for example, `method` or `callbacks.online`."""
        for group, value in self.groups().items():
            if group in PLURAL:
                yield from ((group, f"{group}.{name}", node) for name, node in value.items())
            else:
                yield group, group, value


def config_dir() -> Path:
    """Return the folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def check(config: DictConfig, typed: Iterable[str] = ()) -> Settings:
    """Check every key, type and range of a composed config before anything is built.

    Args:
        config: the composed config.
        typed: the words of the command line. Their groups are checked first, so that a mistake is found before other
            groups import their targets.

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
    for key, value in leaves(plain):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{key}={value} is not allowed; a whole number has at most 64 bits.")
    settings = _validated(Settings, {str(key): value for key, value in plain.items()}, "")
    for group, owned in OWNED.items():
        for name in owned.keys() & getattr(settings, group).keys():
            raise UserError(f"{group}.{name} cannot be set, the program decides it: {owned[name]}.")
    named = {word.lstrip("+~").partition("=")[0].partition(".")[0] for word in typed}
    for group, key, node in sorted(settings.nodes(), key=lambda found: found[0] not in named):
        check_node(key, node, GIVEN.get(group, ()))
        if group == "optimizer":
            part = {**settings.bias_and_norm, "_target_": node["_target_"], "_partial_": True}
            check_node("bias_and_norm", part, GIVEN["optimizer"])
    return settings


def build(node: Mapping[str, Any], **given: Any) -> Any:
    """Call the target of a checked node and return the result; return None if `_target_` is null.

    `given` holds the values that the program passes by name. The target receives those that it declares and that the
    node does not set itself.
    """
    if node["_target_"] is None:
        return None
    target = resolve_name(node["_target_"])
    declared = _parameters(target)
    keys = {name: value for name, value in given.items() if name in declared}
    keys |= {name: _built(value) for name, value in node.items() if name not in _HYDRAS}
    arguments = _built(node.get("_args_", []))
    return partial(target, *arguments, **keys) if node.get("_partial_") else target(*arguments, **keys)


def build_as(kind: type[Built], node: Mapping[str, Any], **given: Any) -> Built:
    """Build a node and check that the result is a `kind`; see `build`.

    Raises:
        UserError: the node cannot be built, or gives another type.
    """
    require_kind(kind, node)
    built = build(node, **given)
    if not isinstance(built, kind):
        raise UserError(f"{node['_target_']} gives {type(built).__name__}, and a {kind.__name__} is needed.")
    return built


def require_kind(kind: type, node: Mapping[str, Any]) -> None:
    """Check that the class which a node names is a `kind`, before it is called. What a function gives is not known yet.

    Raises:
        UserError: it is a class of another kind, or the node names none.
    """
    target = None if node["_target_"] is None else resolve_name(node["_target_"])
    if target is None or (isinstance(target, type) and not issubclass(target, kind)):
        named = "null" if target is None else node["_target_"]
        raise UserError(f"{named} is not of the kind {kind.__name__}, which is needed here; choose another.")


def with_new_keys(saved: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved config, completed with today's values of all keys that were added since.

    Keys are added at the root, and to nodes whose target is unchanged. A mapping of names, such as `callbacks`, keeps
    the names that it was saved with.
    """
    merged = {**today, **saved}
    for key, before in saved.items():
        now = today.get(key)
        if key in PLURAL and isinstance(now, Mapping):
            merged[key] = {name: _renewed(node, now.get(name)) for name, node in before.items()}
        elif key == "loader" or (isinstance(before, Mapping) and "_target_" in before):
            merged[key] = _renewed(before, now)
    return merged


def _renewed(before: Any, now: Any) -> Any:
    if isinstance(before, Mapping) and isinstance(now, Mapping) and before.get("_target_") == now.get("_target_"):
        return {**now, **before}
    return before


def fingerprint(settings: Settings) -> str:
    """Return a short hash of all values. Equal configs have equal hashes."""
    text = json.dumps(settings.model_dump(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def unfilled(error: InterpolationResolutionError) -> str:
    """Return the error message for a value that refers to nothing."""
    reason = str(error).splitlines()[0]
    return f"{error.full_key} cannot be filled in ({reason}); name a key in full, as ${{seed}}."


def no_keys(group: str, wrong: str) -> str:
    """Return the error message for a key of a group that is `none`."""
    return f"{group} is none and has no keys, so {wrong} has no meaning; drop it or choose another {group}."


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """Return `did you mean a or b?`, or all known names if none is similar."""
    names = sorted(known)
    if not names:
        return "there is nothing to choose from."
    near = difflib.get_close_matches(wrong, names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}."


def check_node(key: str, node: Any, given: Collection[str] = ()) -> None:
    """Check the keys of a node, and of the nodes in it, against the parameters of its `_target_`.

    Args:
        key: the place of the node in the config, for the error message.
        node: the mapping.
        given: names of the values that the program passes.

    Raises:
        UserError: a key is missing, unknown, or has a value that is not allowed.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        advice = f"add {key}._target_=<class>" if "." in key else f"choose one of the group's YAML files, {key}=<name>"
        raise UserError(f"{key} names no _target_; {advice}.")
    keys = {name: value for name, value in node.items() if name not in _HYDRAS}
    if node["_target_"] is None:
        if keys:
            raise UserError(no_keys(key, f"{key}.{next(iter(keys))}"))
        return
    try:
        target = resolve_name(node["_target_"])
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}._target_={node['_target_']} cannot be imported ({error}); correct the name, or install the package."
        ) from None
    except Exception as error:
        raise UserError(f"{key}._target_={node['_target_']} cannot be imported ({error}).") from None
    if not _has_signature(target):
        raise UserError(
            f"{key}._target_={node['_target_']} does not name its parameters; choose a class or a function."
        )
    whole = not (node.get("_partial_") or "_args_" in node)
    _validated(_schema(target, keys, given, whole), keys, f"{key}.")
    for name, value in node.items():
        for path, nested in _nested(f"{key}.{name}", value):
            check_node(path, nested)


_HYDRAS = ("_target_", "_partial_", "_args_")
"""Keys that say how a target is called. All other keys are its arguments."""


def _built(value: Any) -> Any:
    """Return a value with every node in it built."""
    if isinstance(value, Mapping):
        return build(value) if "_target_" in value else {name: _built(part) for name, part in value.items()}
    return [_built(part) for part in value] if isinstance(value, list) else value


def _nested(key: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the nodes inside a value, each with its key."""
    if isinstance(value, Mapping) and "_target_" in value:
        yield key, value
    elif isinstance(value, Mapping | list):
        for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _nested(f"{key}.{name}", part)


def _has_signature(target: Any) -> bool:
    """Return whether a target can be called and says with what. Some functions that are written in C do not."""
    try:
        inspect.signature(target)
    except (TypeError, ValueError):
        return False
    return True


def _parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the named parameters of a target; the name `**` says that it takes any name."""
    try:
        signature = inspect.signature(target, eval_str=True)
    except (NameError, AttributeError, TypeError):  # an annotation that exists only for type checkers
        signature = inspect.signature(target)
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = ((p, "**" if p.kind is p.VAR_KEYWORD else p.name) for p in signature.parameters.values())
    return {name: p for p, name in names if name == "**" or p.kind in named}


def _schema(
    target: Callable[..., Any], keys: Mapping[str, Any], given: Collection[str], whole: bool
) -> type[BaseModel]:
    """Return a model of a target's parameters. The node may set the values that the program passes, but need not."""
    fields: dict[str, Any] = {}
    parameters = _parameters(target)
    any_name = parameters.pop("**", None)
    for name, parameter in parameters.items():
        optional = not whole or name in given or parameter.default is not parameter.empty
        if name in given and name not in keys:
            continue
        built = not _is_plain(parameter.annotation) and any(_nested("", keys.get(name)))
        annotation = Any if built else _held(parameter.annotation)
        if parameter.default is None:
            annotation = Union[annotation, None]  # noqa: UP007  Any has no |
        fields[name] = (annotation, None if optional else ...)
    config = ConfigDict(**{**_STRICT, "extra": "allow" if any_name else "forbid"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a parameter may have the name of one of pydantic's methods
        return create_model(getattr(target, "__name__", str(target)), __config__=config, **fields)


def _is_plain(annotation: Any) -> bool:
    """Return whether an annotation allows only numbers, texts, truth values and null, which no node gives."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return all(map(_is_plain, arguments))
    return origin is Literal or (arguments[0] if origin is Annotated else annotation) in (
        int,
        float,
        str,
        bool,
        NoneType,
    )


def _held(annotation: Any) -> Any:
    """Return the annotation as far as a YAML value can be checked against it, or else Any."""
    if annotation in (int, float, str, bool, None, NoneType, list, dict):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        members = [_held(member) for member in arguments if getattr(member, "__name__", "") != "Tensor"]
        return Any if Any in members else Union[tuple(members)]  # noqa: UP007  as many as there are
    if origin is Annotated:
        known = _held(arguments[0]) is not Any
    elif origin in (list, dict):
        known = all(argument is Any or _held(argument) is not Any for argument in arguments)
    else:
        known = origin is Literal
    return annotation if known else Any


def _validated(schema: type[Schema], values: Mapping[str, Any], prefix: str) -> Schema:
    try:
        return schema(**values)
    except ValidationError as errors:
        raise UserError(_sentence(errors, schema, values, prefix)) from None


def _sentence(errors: ValidationError, schema: type[BaseModel], values: Mapping[str, Any], prefix: str) -> str:
    """Return the error message for the first mistake. Pydantic's errors for the members of a union become one."""
    first = errors.errors()[0]
    if first["type"] == "missing":
        key = prefix + ".".join(map(str, first["loc"]))
        return f"{key} is missing; add {key}=<value>."
    found = [(_path(error["loc"], values), error) for error in errors.errors()]
    path, error = max((pair for pair in found if pair[0][:1] == found[0][0][:1]), key=lambda pair: len(pair[0]))
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
    """Return the path of a value. Pydantic's own path also names the types of a union that it tried."""
    path: list[Any] = []
    for part in loc:
        inside = range(len(values)) if isinstance(values, list) else values if isinstance(values, Mapping) else ()
        if part in inside:
            path.append(part)
            values = values[part]
    return path


def _fields(schema: type[BaseModel], path: Sequence[Any]) -> Mapping[str, FieldInfo]:
    """Return the fields beside the last name of a path; there are none inside a value that is not a model."""
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
    "greater_than": "greater than {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "less than {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
}


def _allowed(error: Mapping[str, Any]) -> str:
    """Return what a value should be, in plain words."""
    words = _ALLOWED.get(error["type"], "")
    return words.format(**error.get("ctx", {})) or str(error["msg"]).removeprefix("Input should be ").replace("'", "")
