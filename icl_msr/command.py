"""The command line: Hydra's, with mistakes answered in one sentence and exit code 2."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from icl_msr.config import config_dir, no_keys, suggestion
from icl_msr.errors import UserError
from icl_msr.processes import hold_leash
from icl_msr.sweeps import ProcessLauncher, register_resolvers


def main(job: Callable[[DictConfig], float], arguments: Sequence[str] | None = None) -> int:
    """Composes the config from the command line and runs `job` in Hydra's output folder; returns the exit code."""
    hold_leash()
    typed = [rewritten for word in (sys.argv[1:] if arguments is None else arguments) for rewritten in _rewrite(word)]
    typed.sort(key=lambda word: word not in ("-m", "--multirun"))  # Hydra cannot read a flag between overrides
    # Hydra then raises what it would otherwise print in its own words.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    warnings.filterwarnings("ignore", module="hydra|pytorch_lightning|lightning_fabric")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # by forward mode, inside torch
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    register_resolvers()
    Plugins.instance().register(ProcessLauncher)
    codes: list[int] = []

    @wraps(job)  # Hydra names the job after its module
    def answered(config: DictConfig) -> float:
        sys.argv[1:] = typed  # for the ranks and the jobs of a sweep, which repeat the command
        codes.append(0)
        try:
            return job(config)
        except UserError as mistake:
            # Hydra would announce a mistake that leaves the job; and the other jobs of a sweep go on.
            codes[-1] = _refuse(str(mistake))
            return float("nan")

    try:
        source, words = _source(typed)
        sys.argv[1:] = words
        hydra.main(version_base="1.3", config_path=str(source), config_name="config")(answered)()
    except UserError as mistake:
        return _refuse(str(mistake))
    except (HydraException, OmegaConfBaseException, ValueError) as mistake:
        if codes:  # composed and begun, so it is no mistake of the user's
            raise
        return _refuse(sentence(mistake, typed))
    except KeyboardInterrupt:
        return 130
    return max(codes, default=0)


def _source(typed: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """Where the config comes from, and the overrides: `resume=<run folder>` repeats the run's own config.

    Raises:
        UserError: the folder holds no run, or something beside the number of epochs is to be changed.
    """
    folders = [word.partition("=")[2] for word in typed if word.startswith("resume=")]
    if not folders:
        return config_dir(), typed
    folder = Path(folders[-1])
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"resume={folder} is no run that can be continued: it holds no config.yaml; give the folder of a run "
            "that has begun to train."
        )
    epochs = [word for word in typed if word.startswith("trainer.max_epochs=")]
    for word in typed:
        if word not in epochs and not word.startswith(("resume=", "hydra.run.dir=")):
            raise UserError(
                f"{word} cannot be changed when a run is continued; drop it (trainer.max_epochs=N may grow), "
                "or begin a new run."
            )
    where = f"hydra.run.dir='{folder}'"
    return folder.resolve(), [*epochs, where, "hydra.output_subdir=null", "hydra/job_logging=none"]


def sentence(error: Exception, typed: Sequence[str]) -> str:
    """A composition error of Hydra or OmegaConf in one sentence."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read; write key=value, and quote what has spaces: 'key=\"a b\"'."
    if isinstance(error, MissingConfigException) and (missing := re.search(r"'([^'/]*)/([^']*)'", text)):
        return _no_choice(*missing.groups())
    if "Config group override" in text:  # a choice that is no name, such as method=null
        for group, _, choice in (word.partition("=") for word in typed):
            if _choices(group) and choice not in _choices(group):
                return _no_choice(group, choice)
    if several := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{several[1]} has several values; add -m to run them one after the other."
    if twice := re.search(r"already at '([^']*)'", text):
        return f"{twice[1]} is there already; leave the plus out, {twice[1]}=<value>."
    key = getattr(error.__cause__, "full_key", None) or re.search(r"'([^']*)' does not exist", text)
    if key:
        return _no_key(key if isinstance(key, str) else key[1], typed)
    return " ".join(text.split("\n\n")[0].split())


def _no_choice(group: str, wrong: str) -> str:
    return f"{group}={wrong} does not exist; {suggestion(wrong, _choices(group))}"


def _choices(group: str) -> list[str]:
    """The YAML files of a group, those in its folders too."""
    folder = config_dir() / group
    return [str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")] if group else []


def _no_key(wrong: str, typed: Sequence[str]) -> str:
    """A key that is not in the config which the rest of the command line gives."""
    choices = [word for word in typed if re.fullmatch(r"[a-z]+=[\w./-]+", word) and not word.startswith(f"{wrong}=")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            config = compose("config", overrides=choices)
        except Exception:  # the mistake is among the choices; it has its own sentence
            config = compose("config")
    parent = wrong.rpartition(".")[0]
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and not node:  # an open mapping, such as backbone.options
        return f"{wrong} is not there yet; a plus adds it: +{wrong}=<value>."
    if isinstance(node, DictConfig) and node.get("_target_", "") is None:
        return no_keys(parent, wrong)
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


def _rewrite(word: str) -> list[str]:
    """`backbone=timm:NAME` is short for two overrides."""
    match = re.fullmatch(r"backbone=timm:(\S+)", word)
    return ["backbone=timm", f"backbone.name={match[1]}"] if match else [word]


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
