"""Write the checkpoint that a run continues from."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from icl_msr.core.storage import replacing
from icl_msr.models.checkpoint import read_checkpoint


class AtomicCheckpoint(TorchCheckpointIO):
    """Writes checkpoints atomically: the old or the new one exists at any moment. They hold only data, no code.

    Lightning holds a second copy in memory, writes it to the system's temporary folder without syncing it, and then
    moves it. Across file systems the move is a copy, and a killed process leaves half of it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a new file beside the old one, then replace the old one.

        Raises:
            UserError: the folder cannot be written. The old checkpoint, if any, is kept.
            FileNotFoundError: the run's folder was deleted.
        """
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        with replacing(path, f"continue with resume={path.parent.parent}") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))
