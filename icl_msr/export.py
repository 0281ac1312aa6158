"""`python -m icl_msr.export RUN`: the encoder of a run's last checkpoint, for plain torchvision or timm."""

import sys
from collections.abc import Sequence
from pathlib import Path

from icl_msr.core import trust
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import expanded, require_local
from icl_msr.core.terminal import Arguments, answering


@answering
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, export, and return the exit code."""
    parser = Arguments(
        prog="python -m icl_msr.export",
        description="Writes encoder.safetensors and encoder.json, which plain torchvision or timm load, from the last "
        "checkpoint of a run, finished or not.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--encoder",
        choices=("online", "momentum"),
        default="online",
        help="the trained one (default), or its momentum copy",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where the files go (default: RUN itself, and RUN/momentum for the momentum encoder)",
    )
    parser.add_argument(
        "trust", nargs="*", metavar="trust=PACKAGE", help="let the run's config name code of this package of yours"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another encoder that lies there")
    options = parser.parse_intermixed_args(arguments)
    run, to = expanded(options.run), options.to and expanded(options.to)
    folder: Path = to or (run if options.encoder == "online" else run / options.encoder)
    trust.leave_working_directory(options.trust)
    require_local(folder, "--to")
    try:
        if unknown := trust.given(options.trust):
            raise UserError(f"{unknown[0]} is one word too many; give one run, and trust=PACKAGE.")
        export(run, options.encoder, folder, overwrite=options.overwrite)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another one, --to FOLDER.") from None
    return 0


def export(run: Path, encoder: str, folder: Path, *, overwrite: bool) -> None:
    """Write the encoder of a run into `folder`, and print its files and the Python that loads them.

    Raises:
        UserError: there is no such run or encoder, or another one lies in `folder` and `overwrite` is false.
    """
    from icl_msr.evaluation.subject import rebuild  # with torch, which a help text need not wait for
    from icl_msr.models.exported import by_file, export_encoder, python_to_load, weights

    backbone, facts = rebuild(RunFolder(run), encoder)
    encoders = {folder / name: part for name, part in by_file(backbone).items()}
    for file, part in encoders.items():
        if file.exists() and not overwrite and file.read_bytes() != weights(part):
            raise UserError(f"{file} holds other weights; add --overwrite to replace them, or --to ANOTHER_FOLDER.")
    folder.mkdir(parents=True, exist_ok=True)
    export_encoder(backbone, folder, facts)
    for file in encoders:
        print(file, file.with_suffix(".json"), sep="\n")
    print("", python_to_load(backbone, str(next(iter(encoders)))), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
