"""Write the checkpoint that a run continues from."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from icl_msr.core.storage import replacing
from icl_msr.models.checkpoint import read_checkpoint


class AtomicCheckpoint(TorchCheckpointIO):
    """Checkpoints of which the old or the new one is there at any moment, and which are data alone.

    Lightning's own way holds a second copy in memory, writes it into the system's temporary folder without syncing
    it, and moves it from there: across file systems that is a copy, which a kill leaves half done.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes beside the old file, then takes its place.

        Raises:
            UserError: the disk is full; the old checkpoint, if any, is still there.
        """
        path = Path(path)
        with replacing(path, f"continue with resume={path.parent.parent}") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))
