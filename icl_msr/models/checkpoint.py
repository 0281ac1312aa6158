"""Reads the checkpoint of a run without executing anything in it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from icl_msr.core.errors import UserError
from icl_msr.core.storage import is_stored


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a run's checkpoint, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: there is no such file, it is damaged, it would execute code, or another program wrote it.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; give a run that has come to the end of its first epoch.")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing, writes checksums and never checks them.
            damaged = not is_stored(archive, path) or archive.testzip() is not None
    except Exception:
        damaged = True
    if damaged:
        raise UserError(f"{path} is damaged, cut short or no checkpoint; restore it from a copy, or begin a new run.")
    content: Any = None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} could execute code, so it was not loaded; give a checkpoint of icl_msr.") from error
    except Exception:
        pass  # an archive of another kind
    state = content.get("state_dict") if isinstance(content, dict) else None
    ours = isinstance(state, dict) and any(str(name).startswith("method.") for name in state)
    if not (ours and {"loops", "global_step"} <= content.keys()):
        raise UserError(f"{path} is not a checkpoint of icl_msr; give a run's checkpoints/last.ckpt.")
    checkpoint: dict[str, Any] = content
    return checkpoint
