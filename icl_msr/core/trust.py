"""Check the code that a config from a folder names.

Somebody else may have written the folder. So each `_target_` in it must have the kind of its group, such as a method of
icl-msr or an optimiser of torch. It is not enough that the target lies in a known package: `torch.hub.load` does. The
check imports only modules of these packages. `trust=<package>` on the command line lets a saved config name everything
in a package. Targets that the user types are not checked.
"""

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_type_hints

from icl_msr.core.config import PLURAL
from icl_msr.core.errors import UserError
from icl_msr.core.saved import leaves, shown

Kinds = Mapping[str, str]
"""Maps a package to the class that its classes inherit from, or that its functions return."""

CALLABLE = "collections.abc.Callable"

KINDS: dict[str, Kinds] = {
    "method": {"icl_msr.methods": "icl_msr.methods.Method"},
    "regularizer": {"icl_msr.regularizers": "torch.nn.Module"},
    "negatives": {"icl_msr.negatives": "builtins.object"},
    "hard_negatives": {"icl_msr.losses": "icl_msr.losses.hard_negatives.HardNegatives"},
    "augment": {"icl_msr.augment": CALLABLE},
    "background": {"icl_msr.augment": CALLABLE},
    "optimizer": {"torch.optim": "torch.optim.Optimizer", "timm.optim": "torch.optim.Optimizer"},
    "schedule": {
        "torch.optim.lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
        "icl_msr.training.optimization": "torch.optim.lr_scheduler.LRScheduler",
    },
    "backbone": {"icl_msr.models": "icl_msr.models.backbones.Backbone"},
    "hardware": {"icl_msr.training.hardware": "icl_msr.training.hardware.Hardware"},
    "dataset": {"icl_msr.data": "icl_msr.data.dataset.Dataset"},
    "evaluation": {"icl_msr.evaluation": CALLABLE},
    "trainer": {"pytorch_lightning": "pytorch_lightning.Trainer"},
    "callbacks": {
        "pytorch_lightning.callbacks": "pytorch_lightning.callbacks.Callback",
        "icl_msr.training": "pytorch_lightning.callbacks.Callback",
    },
    "logger": {
        "pytorch_lightning.loggers": "pytorch_lightning.loggers.Logger",
        "icl_msr.training": "pytorch_lightning.loggers.Logger",
    },
}
"""Kinds that are allowed as the `_target_` of a group."""

NESTED: Kinds = {
    "torch.nn": "torch.nn.Module",
    "torch.optim.lr_scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "torch.optim": "torch.optim.Optimizer",
    "torchvision.transforms": CALLABLE,
    "timm.layers": "torch.nn.Module",
    "timm.optim": "torch.optim.Optimizer",
    "pytorch_lightning.callbacks": "pytorch_lightning.callbacks.Callback",
    "pytorch_lightning.profilers": "pytorch_lightning.profilers.Profiler",
    "icl_msr.augment": CALLABLE,
    "icl_msr.negatives": "builtins.object",
    "icl_msr.data": "icl_msr.data.dataset.Dataset",
}
"""Kinds that are allowed as the `_target_` of a node inside a node."""

WRITERS = ("callbacks", "logger", "trainer")
"""Groups whose classes write files."""

_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")
_PLACE = re.compile(r"(dir|dirpath|directory|folder|path)$|\._args_\.\d+$")
"""Keys that name a place to write to."""
_ELSEWHERE = re.compile(r"^[/~\\]|://|(^|[/\\])\.\.($|[/\\])")
_trusted: set[str] = set()


def given(words: Sequence[str]) -> list[str]:
    """Trust the packages named by `trust=<package>` or `trust=[a,b]` for this command; return the other words.

    Raises:
        UserError: such a word does not name a package.
    """
    _trusted.clear()
    for word in words:
        if not _is_trust(word):
            continue
        names = [name.strip() for name in word.partition("=")[2].strip("[]'\" ").split(",")]
        for name in names:
            if not name.isidentifier() or name in sys.stdlib_module_names:
                raise UserError(f"{shown(word)} names no package that may be trusted; write trust=<package>.")
        _trusted.update(names)
    return [word for word in words if not _is_trust(word)]


def word() -> list[str]:
    """Return the word that makes another process trust the same packages; none if no package is trusted."""
    return [f"trust=[{','.join(sorted(_trusted))}]"] if _trusted else []


def require(config: Mapping[str, Any], file: Path, groups: Iterable[str] | None = None) -> None:
    """Check that every `_target_` of a saved config, in some groups or in all, is allowed.

    Raises:
        UserError: a target has the wrong kind or an untrusted package, or a key says where to write.
    """
    for group in config if groups is None else groups:
        for key, node, top in _nodes(group, config.get(group)):
            _require_kind(key, node["_target_"], KINDS[group] if top else NESTED, file)
            if group in WRITERS and not _is_trusted(node["_target_"]):
                _require_no_place(key, node, file)


def leave_working_directory(words: Sequence[str]) -> None:
    """Remove the working directory, which `python -m` puts first, from `sys.path`.

    It stays if PYTHONPATH names it, or if the command names the user's own code. The program's own checkout moves to
    the end.
    """
    own_code = any("_target_=" in word or "searchpath=" in word or _is_trust(word) for word in words)
    here = os.path.realpath(os.curdir)
    listed = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if own_code or here in map(os.path.realpath, listed):
        return
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.curdir) != here]
    if here == os.path.realpath(Path(__file__).parents[2]):
        sys.path.append(here)


def _is_trust(word: str) -> bool:
    return word.startswith("trust=")


def _is_trusted(target: Any) -> bool:
    return isinstance(target, str) and target.partition(".")[0] in _trusted


def _nodes(group: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield every node of a group with its key, and whether it is a node of the group itself, not inside another."""
    own = [group]
    if group in PLURAL and isinstance(value, Mapping) and "_target_" not in value:
        own = [f"{group}.{name}" for name in value]
    for key, node in _below(group, value):
        yield key, node, key in own and group in KINDS


def _below(key: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield key, value
        for name, part in value.items():
            yield from _below(f"{key}.{name}", part)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _below(f"{key}.{number}", part)


def _require_kind(key: str, target: Any, kinds: Kinds, file: Path) -> None:
    if target is None or _is_trusted(target) or _is_of(target, kinds):
        return
    package = str(target).partition(".")[0]
    said = f"{shown(f'{key}._target_={target}')} in {file}"
    known = {"icl_msr", "torch", "torchvision", "pytorch_lightning", "timm", "hydra", "omegaconf"}
    if not package.isidentifier() or package in sys.stdlib_module_names or package in known:
        raise UserError(f"{said} is not what may stand there, a class of {' or '.join(kinds)}; correct the file.")
    raise UserError(f"{said} is code of the package {package}; if you trust it, add trust={package}.")


def _is_of(target: Any, kinds: Kinds) -> bool:
    """Return whether a name is a public class of one of the kinds, or a function that returns one."""
    if not isinstance(target, str) or not _NAME.fullmatch(target):
        return False
    for package, kind in kinds.items():
        if not target.startswith(f"{package}."):
            continue
        module, _, name = target.rpartition(".")
        try:
            found = getattr(import_module(module), name, None)
        except ModuleNotFoundError as error:
            return error.name == package.partition(".")[0]  # not installed; the error is raised when it is built
        own = str(getattr(found, "__module__", "")).startswith(package)  # not imported by the module
        made = _returned(found) if inspect.isfunction(found) else found
        if own and inspect.isclass(made) and issubclass(made, resolve_name(kind)):
            return True
    return False


def _returned(function: Any) -> Any:
    try:
        return get_type_hints(function).get("return")
    except NameError:  # a name only for type checkers
        return None


def _require_no_place(key: str, node: Mapping[str, Any], file: Path) -> None:
    for name, value in leaves(dict(node), key):
        if isinstance(value, str) and value and (_PLACE.search(name) or _ELSEWHERE.search(value)):
            package = str(node["_target_"]).partition(".")[0]
            raise UserError(
                f"{shown(f'{name}={value}')} in {file} says where to write, and a saved config may not; if it is your "
                f"own, add trust={package}."
            )
