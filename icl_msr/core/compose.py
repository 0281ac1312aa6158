"""Composing configs with Hydra, also in the middle of one of its jobs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from icl_msr.core.config import config_dir


@contextmanager
def hydra_for_itself() -> Iterator[GlobalHydra]:
    """Set Hydra up on the folder `conf` for a while; a job that runs finds its own state again afterwards."""
    state = GlobalHydra.instance()
    before = state.hydra
    state.clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield state
    finally:
        state.hydra = before


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the config that overrides give, without Hydra's own node.

    Raises:
        HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError: it cannot be composed.
    """
    with hydra_for_itself():
        return hydra.compose("config", overrides=list(overrides))


@contextmanager
def known_to_hydra(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` refer to this config for a while."""
    state = HydraConfig.instance()
    before = state.cfg
    state.set_config(config)
    try:
        yield
    finally:
        state.cfg = before
