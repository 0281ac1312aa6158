"""`python -m icl_msr.shards --to FOLDER dataset=...`: any data set in shards, for a store or for a disk that is slow.

Shards are WebDataset tars with an index beside each. `dataset=shards dataset.url=FOLDER` reads them.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icl_msr.core.storage import expanded
from icl_msr.core.terminal import Arguments, answering

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from icl_msr.core.config import Settings


@answering
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the shards, and return the exit code."""
    parser = Arguments(
        prog="python -m icl_msr.shards",
        description="Writes a data set as WebDataset tars, FOLDER/train-000000.tar and so on, with an index beside "
        "each. Images are copied as they are. Shards that are there are kept, so the command can be repeated.",
    )
    parser.add_argument(
        "--to", required=True, metavar="FOLDER", help="where the shards go: a folder, or a URL such as s3://"
    )
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="images in a shard (default 1000)")
    parser.add_argument("--short-side", type=int, metavar="PIXELS", help="scale larger images down to this short side")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of images that are scaled (default 90)")
    parser.add_argument("words", nargs="*", metavar="WORD", help="as for icl_msr.run: dataset=..., dataset.root=...")
    options = parser.parse_intermixed_args(arguments)
    if min(options.images, options.short_side or 1) < 1 or not 1 <= options.quality <= 100:
        parser.error("--images and --short-side are at least 1, and --quality lies in 1 to 100")
    from icl_msr.cli import command  # brings Hydra along
    from icl_msr.cli.processes import in_folder

    def shards(settings: "Settings", config: "DictConfig") -> float:
        from icl_msr.cli import sharding  # which brings torch along

        chosen = sharding.Options(options.to, options.images, options.short_side, options.quality)
        return sharding.job(settings, chosen)

    folder = expanded(options.to)
    if "://" in options.to:  # shards are made here before they go to the store
        folder = Path(".cache/icl-msr/uploads") / hashlib.sha256(options.to.encode()).hexdigest()[:16]
    return command.main(shards, [*options.words, in_folder(folder)])


if __name__ == "__main__":
    sys.exit(main())
