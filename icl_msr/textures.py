"""`python -m icl_msr.textures --to FOLDER dataset=...`: a texture for every training image, made once and kept.

Ge et al. 2021 train on such a folder. Theirs is written by another program; ours by image quilting, from the same two
pieces of the raw image. `negatives=cached negatives.folder=FOLDER` reads either.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icl_msr.core.storage import expanded, require_local
from icl_msr.core.terminal import Arguments, answering

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from icl_msr.core.config import Settings


@answering
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the textures, and return the exit code."""
    parser = Arguments(
        prog="python -m icl_msr.textures",
        description="Writes a texture for every training image, as FOLDER/train/<class>/<stem>.png. Textures that are "
        "there and sound are kept, so the command can be stopped and repeated.",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the textures go")
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="as for icl_msr.run: dataset=..., seed=..., negatives.block=..."
    )
    options = parser.parse_intermixed_args(arguments)
    require_local(options.to, "--to")
    chosen = [word for word in options.words if word.startswith("negatives=")]
    words = [*options.words, *([] if chosen else ["negatives=texture"])]
    from icl_msr.cli import command  # brings Hydra along
    from icl_msr.cli.processes import in_folder

    return command.main(textures, [*words, in_folder(expanded(options.to))])


def textures(settings: "Settings", config: "DictConfig") -> float:
    """Run `icl_msr.cli.quilting.job`, which brings torch along."""
    from icl_msr.cli import quilting

    return quilting.job(settings, config)


if __name__ == "__main__":
    sys.exit(main())
