"""Hydra's command line. A user's mistake gives one sentence and exit code 2."""

import difflib
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from icl_msr.cli.elsewhere import Task
from icl_msr.cli.footprint import Footprint, require_common_folder
from icl_msr.cli.processes import hold_leash, in_folder, told
from icl_msr.cli.stopping import leave_if_stopped
from icl_msr.cli.sweeps import exit_codes, register_resolvers
from icl_msr.cli.words import ambiguous, for_sweep, overrides, path_in, spelled_out, unreadable
from icl_msr.core import trust
from icl_msr.core.compose import VERSION_BASE, compose, hydra_for_itself
from icl_msr.core.config import MOVABLE, UNSEEN, Settings, check, config_dir, no_keys, suggestion, unfilled
from icl_msr.core.errors import SharedMistake, UserError, reason
from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import adopt, is_first
from icl_msr.core.storage import unwritable
from icl_msr.core.terminal import about_the_machine, complain, outlive_reader

Job = Callable[[Settings, DictConfig], float]
"""A function that runs a command. It takes the checked settings and the composed config and returns the metric."""

_MISTAKES = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)
_MULTIRUN = {"-m", "--multirun"}
_CHOICE = r"((?:hydra/)?[^/]*)/(.*)"
"""Pattern of a config file's path: the group and the rest of the name."""


def main(job: Job, arguments: Sequence[str] | None = None) -> int:
    """Compose and check the config, run `job` in Hydra's output folder, and return the exit code."""
    hold_leash()
    outlive_reader()
    typed = overrides(sys.argv[1:] if arguments is None else arguments)
    # Makes Hydra raise the errors that it would otherwise print.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    warnings.filterwarnings("ignore", module="hydra|pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch warns of it in forward mode
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    register_resolvers()
    exit_codes.clear()
    Footprint.made.clear()
    said: set[str] = set()

    def refuse(message: str, shared: bool = True) -> int:
        # Another job of the sweep or another rank may have said it.
        if message not in said and (is_first() or not shared):
            complain(message)
        said.add(message)
        Footprint.erase()
        return 2

    def checked(config: DictConfig) -> Settings:
        try:
            return check(config, typed)
        except UserError as mistake:
            if saved is None:
                raise
            raise type(mistake)(f"{HydraConfig.get().runtime.output_dir}/config.yaml: {mistake}") from None

    @wraps(job)  # Hydra names the job after its module
    def answered(config: DictConfig) -> float:
        sys.argv[1:] = typed  # ranks and the jobs of a sweep repeat the command
        exit_codes.append(0)
        try:
            if saved is not None:
                config = saved
            return job(checked(config), config)
        except UserError as mistake:
            # An error that leaves the job would make Hydra print its own message and stop the other jobs of a sweep.
            exit_codes[-1] = refuse(str(mistake), isinstance(mistake, SharedMistake))
            return float("nan")
        except Exception as fault:
            folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
            if cause := unwritable(fault, folder.path):
                exit_codes[-1] = refuse(f"{cause} and {folder.advice}.", shared=False)
                return float("nan")
            if sentence := about_the_machine(fault):
                kept = f" What was trained is kept; {folder.advice}." if folder.checkpoint.exists() else ""
                exit_codes[-1] = refuse(sentence + kept, shared=False)
                return float("nan")
            if folder.checkpoint.exists():
                fault.add_note(f"What was trained is kept; {folder.advice}.")
            if told(fault):
                sys.exit(1)
            raise

    try:
        adopt()
        trust.leave_working_directory(typed)
        asked = trust.given(typed)
        _check_flags(asked)
        _check_search_path(asked)
        saved, words = _resumed(asked)
        if _MULTIRUN & set(typed):
            words = for_sweep(words)
        else:
            require_common_folder(words)
            words = spelled_out(words)
        sys.argv[1:] = words
        hydra.main(config_path=str(config_dir()), config_name="config", **VERSION_BASE)(Task(answered))()
    except UserError as mistake:
        return refuse(str(mistake))
    except SystemExit as end:
        if exit_codes or end.code not in (1, 2):  # Hydra has printed what is wrong, with code 1, or a callback of ours
            raise
        return 2
    except Exception as mistake:
        leave_if_stopped()  # a launcher may dislike that its jobs have ended
        plugins = _of_plugin(mistake, typed)
        known = plugins or isinstance(mistake, _MISTAKES) or _is_hydras(mistake)
        if exit_codes or not known:  # once a job has begun, it is not a mistake of the user
            raise
        return refuse(plugins or sentence(mistake, typed))
    if not exit_codes:  # a help text was printed, or the sweep had nothing to do
        Footprint.erase()
    return max(exit_codes, default=0)


def _resumed(typed: Sequence[str]) -> tuple[DictConfig | None, Sequence[str]]:
    """Return the config of the run that `resume=FOLDER` continues, or None for a new run, and the words for Hydra.

    The saved config is read only as data. Hydra composes the program's own config, and the saved one then replaces it.

    Raises:
        UserError: the folder holds no run, its config is not trusted, or a word changes something other than the
            number of epochs and the keys in `UNSEEN` and `MOVABLE`.
    """
    folders = [path_in(word) for word in typed if word.startswith("resume=")]
    if not folders:
        return None, typed
    folder = RunFolder(Path(folders[-1]))
    if not folder.begun:
        raise UserError(
            f"resume={folder} is not a run that can be continued: it holds no config.yaml; give the folder of a run "
            "that has begun to train."
        )
    trust.require(folder.saved_config(), folder.config)
    config = OmegaConf.create(folder.saved_config(resolve=False))
    changes = [word for word in typed if word.partition("=")[0] in ("trainer.max_epochs", *UNSEEN, *MOVABLE)]
    for word in typed:
        if word not in changes and not word.startswith(("resume=", "hydra.run.dir=")):
            raise UserError(
                f"{word} cannot be changed when a run is continued; drop it (trainer.max_epochs=N may grow, and "
                f"{', '.join((*UNSEEN, *MOVABLE))} may change), or begin a new run."
            )
    for change in OverridesParser.create().parse_overrides(changes):
        if change.key_or_group in MOVABLE and change.is_sweep_override():
            raise UserError(f"{change.input_line} has several values, and a run is continued once; give one value.")
        if not change.is_sweep_override():  # Hydra refuses another sweep
            OmegaConf.update(config, change.key_or_group, change.value())
    known = [word for word in changes if word.partition("=")[0] not in MOVABLE]  # by Hydra, whose config is replaced
    return config, [*known, in_folder(folder.path)]


def _is_hydras(error: BaseException) -> bool:
    """Return whether an error was raised below Hydra, and not below code of ours that Hydra calls.

    Hydra raises many kinds of errors for what a user types.
    """
    modules = _modules(error)
    return "hydra.main" in modules and not any(name.startswith("icl_msr.") for name in modules[1:])


def _of_plugin(error: BaseException, typed: Sequence[str]) -> str | None:
    """Return the sentence about an error that somebody else's plug-in for Hydra has met; None about any other one."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return None
    for kind, other in {"launcher": "process", "sweeper": "basic"}.items():
        if any(re.match(rf"hydra_plugins\.\w*_{kind}\b", name) for name in _modules(error)):
            chosen = next((word for word in typed if word.startswith(f"hydra/{kind}=")), f"hydra.{kind}")
            return f"{chosen} has failed ({type(error).__name__}: {reason(error)}); type hydra/{kind}={other} instead."
    return None


def _modules(error: BaseException) -> list[str]:
    return [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]


def _check_flags(typed: Sequence[str]) -> None:
    """Check the flags. Hydra's own parser would print several lines of usage.

    Raises:
        UserError: Hydra does not know a flag, or the value of a flag is wrong.
    """
    parser = get_args_parser()
    parser.exit_on_error = parser.allow_abbrev = False
    try:
        options, unknown = parser.parse_known_args(typed)
    except ArgumentError as error:
        raise UserError(f"{str(error).removeprefix('argument ')}.") from None
    if options.experimental_rerun:
        raise UserError("--experimental-rerun reads a pickle, which can execute code; type resume=FOLDER instead.")
    if options.package and not options.cfg:
        raise UserError("--package says what --cfg shows; write --cfg job --package NAME.")
    for word in unknown:
        if word.startswith("-"):
            key = word.lstrip("-").partition("=")[0]
            raise UserError(f"{word} is not an option; a key is written without dashes: {key}=<value>.")
    if unknown:
        raise UserError(f"{unknown[0]} stands after an option; write options such as --cfg job before all else.")


def _check_search_path(typed: Sequence[str]) -> None:
    """Check that every entry of `hydra.searchpath` exists. Hydra ignores missing ones.

    Raises:
        UserError: `hydra.searchpath` names a package or folder that does not exist.
    """
    for word in _search_path(typed):
        paths: Any = OverridesParser.create().parse_overrides([word])[0].value()
        for path in paths if isinstance(paths, list) else []:
            scheme, _, name = str(path).rpartition("://")
            if not (_importable(name.replace("/", ".")) if scheme == "pkg" else Path(name).is_dir()):
                raise UserError(
                    f"hydra.searchpath: there is no {path}; name a package that Python can import, as "
                    "pkg://package.conf, or a folder, as file:///home/me/conf."
                )


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def sentence(error: Exception, typed: Sequence[str]) -> str:
    """Return one sentence for an error of Hydra, OmegaConf or the file system from before the job began."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return unreadable(str(error.override))
    if isinstance(error, MissingConfigException) and (missing := re.fullmatch(_CHOICE, error.missing_cfg_file or "")):
        return _no_choice(missing[1], missing[2], typed)
    if "Config group override" in text:  # the choice is not a name, as in method=null
        for group, _, choice in (word.partition("=") for word in typed):
            if (known := _choices(group, typed)) and choice not in known:
                return _no_choice(group, choice, typed)
    if isinstance(error, InterpolationResolutionError):
        return unfilled(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name} is not YAML: {error.problem} in line {mark.line + 1}, column {mark.column + 1}."
    if isinstance(error, UnicodeDecodeError):
        return f"A YAML file on the search path is not in UTF-8 ({error.reason}); save it as UTF-8."
    if isinstance(error, OSError) and error.filename:
        which = "hydra.sweep.dir" if _MULTIRUN & set(typed) else "hydra.run.dir"
        return f"{error.filename} cannot be written ({error.strerror}); choose another {which}."
    if "does not support sweep type" in text:
        return "interval(...) is a range, and this sweep tries values; write them out, or add hydra/sweeper=optuna."
    if several := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return ambiguous(several[1])
    if twice := re.search(r"already at '([^']*)'", text):
        return f"{twice[1]} is there already; leave the plus out, {twice[1]}=<value>."
    cause = error.__cause__
    key = getattr(cause, "full_key", None) or re.search(r"'([^']*)' does not exist", text)
    if isinstance(cause, OmegaConfBaseException) and not isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{cause.full_key} cannot be set: {reason(cause)}."
    if key:
        return _no_key(key if isinstance(key, str) else key[1], typed)
    first = " ".join(text.split("\n\n")[0].split())
    return first if first.endswith(".") else f"{first}."


def _no_choice(group: str, wrong: str, typed: Sequence[str]) -> str:
    advice, kind = suggestion(wrong, _choices(group, typed)), group.removeprefix("hydra/")
    if kind in ("launcher", "sweeper") and advice[-1] == ".":
        advice = f"{advice[:-1]}, or install its plug-in: pip install hydra-{wrong}-{kind}."
    return f"{group}={wrong} does not exist; {advice}"


def _choices(group: str, typed: Sequence[str]) -> list[str]:
    """Return the choices of a group on the whole search path, including those in its subfolders."""
    with hydra_for_itself() as state:
        loader = state.config_loader()

        def inside(folder: str) -> list[str]:
            files, folders = (
                loader.get_group_options(folder, kind, "config", _search_path(typed))
                for kind in (ObjectType.CONFIG, ObjectType.GROUP)
            )
            return [*files, *(f"{name}/{choice}" for name in folders for choice in inside(f"{folder}/{name}"))]

        return inside(group) if group else []


def _search_path(typed: Sequence[str]) -> list[str]:
    return [word for word in typed if word.startswith("hydra.searchpath=")]


def _no_key(wrong: str, typed: Sequence[str]) -> str:
    """Return the sentence about a key that is not in the config."""
    choice = re.compile(r"[a-z]+=([\w./-]+|\[[\w./, -]+\])")
    choices = [word for word in typed if choice.fullmatch(word) and not word.startswith(f"{wrong}=")]
    try:
        config = compose([*_search_path(typed), *choices])
    except Exception:  # a choice is wrong too, and has its own sentence
        config = compose([])
    parent = wrong.rpartition(".")[0]
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and not node:  # an empty mapping takes any key, such as backbone.options
        return f"{wrong} is not there yet; a plus adds it: +{wrong}=<value>."
    if isinstance(node, DictConfig) and node.get("_target_", "") is None:
        return no_keys(parent, wrong)
    target = str(node.get("_target_", "")) if isinstance(node, DictConfig) else ""
    similar = difflib.get_close_matches(wrong.rpartition(".")[2], map(str, node) if node else [])
    if target and not target.startswith("icl_msr.") and not similar:  # our own YAML files list all keys
        return f"{wrong} is not a key of the YAML file; if {target} has it, a plus adds it: +{wrong}=<value>."
    keys = _flat(config, "")
    advice = suggestion(wrong, [key for key in keys if key.rpartition(".")[0] == parent] or keys)
    return f"{wrong} is not a key; {advice if len(advice) < 500 else '--cfg job lists all keys.'}"


def _flat(node: DictConfig | ListConfig, prefix: str) -> list[str]:
    keys: list[str] = []
    for name in node if isinstance(node, DictConfig) else []:
        keys.append(f"{prefix}{name}")
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            keys += _flat(node[name], f"{prefix}{name}.")
    return [key for key in keys if not key.endswith("_target_")]
