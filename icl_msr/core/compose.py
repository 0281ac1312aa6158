"""Compose configs with Hydra, also inside a running Hydra job."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from icl_msr.core.config import config_dir

VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
"""The argument by which Hydra 1.3 behaves as of today. Hydra 1.4 warns of it."""


@contextmanager
def hydra_for_itself() -> Iterator[GlobalHydra]:
    """Initialise Hydra on the folder `conf` inside the context, and restore the state of a running job afterwards."""
    state = GlobalHydra.instance()
    before = state.hydra
    state.clear()
    try:
        with initialize_config_dir(str(config_dir()), **VERSION_BASE):
            yield state
    finally:
        state.hydra = before


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the config that the overrides give, without Hydra's own node.

    Raises:
        HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError: the config cannot be composed.
    """
    with hydra_for_itself():
        return hydra.compose("config", overrides=list(overrides))


@contextmanager
def known_to_hydra(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` refer to this config inside the context."""
    state = HydraConfig.instance()
    before = state.cfg
    state.set_config(config)
    try:
        yield
    finally:
        state.cfg = before
