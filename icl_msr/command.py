"""The command line: Hydra's, with mistakes answered in one sentence and exit code 2."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from icl_msr.config import config_dir, suggestion
from icl_msr.errors import UserError


def main(job: Callable[[DictConfig], float], arguments: Sequence[str] | None = None) -> int:
    """Composes the config from the command line and runs `job` in Hydra's output folder; returns the exit code."""
    typed = [rewritten for word in (sys.argv[1:] if arguments is None else arguments) for rewritten in _rewrite(word)]
    # Hydra then raises what it would otherwise print in its own words.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    warnings.filterwarnings("ignore", module="hydra|pytorch_lightning|lightning_fabric")
    sys.argv[1:] = typed
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(job)()
    except UserError as mistake:
        return _refuse(str(mistake))
    except (HydraException, OmegaConfBaseException) as mistake:
        return _refuse(sentence(mistake, typed))
    return 0


def sentence(error: Exception, typed: Sequence[str]) -> str:
    """A composition error of Hydra or OmegaConf in one sentence."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read; write key=value, and quote what has spaces: 'key=\"a b\"'."
    if isinstance(error, MissingConfigException):
        missing = re.search(r"'([^']*)/([^'/]*)'", text)
        if missing:
            group, wrong = missing.groups()
            folder = config_dir() / group
            known = [file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_")]
            return f"{group}={wrong} does not exist; {suggestion(wrong, known)}"
    key = re.search(r"Could not override '([^']*)'|Key '([^']*)' is not in struct|full_key: (\S+)", text)
    if isinstance(error, ConfigCompositionException | OmegaConfBaseException) and key:
        wrong = next(name for name in key.groups() if name)
        return f"{wrong} is not a key; {suggestion(wrong, _known_keys(typed, wrong))}"
    return " ".join(text.split())


def _known_keys(typed: Sequence[str], wrong: str) -> list[str]:
    """All keys of the config that the rest of the command line gives, or of the default one."""
    choices = [word for word in typed if re.fullmatch(r"[a-z]+=[\w./-]+", word) and not word.startswith(f"{wrong}=")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            config = compose("config", overrides=choices)
        except Exception:  # the mistake is among the choices; it has its own sentence
            config = compose("config")
    keys = list(_flat(config, ""))
    parent = wrong.rpartition(".")[0]
    siblings = [key for key in keys if key.rpartition(".")[0] == parent]
    return siblings or keys


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
