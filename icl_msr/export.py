"""`python -m icl_msr.export RUN`."""

import argparse
import sys
from pathlib import Path

from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.evaluation.subject import ENCODERS, rebuild
from icl_msr.models.exported import by_file, export_encoder, python_to_load, weights


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, export; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_msr.export",
        description="Writes encoder.safetensors and encoder.json, which plain torchvision or timm load, from the last "
        "checkpoint of a run, finished or not.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--encoder", choices=list(ENCODERS), default="online", help="the trained one (default), or its momentum copy"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where the files go (default: RUN itself, and RUN/momentum for the momentum encoder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another encoder that lies there")
    options = parser.parse_args(arguments)
    folder: Path = options.to or (options.run if options.encoder == "online" else options.run / options.encoder)
    try:
        backbone, facts = rebuild(RunFolder(options.run), options.encoder)
        encoders = {folder / name: encoder for name, encoder in by_file(backbone).items()}
        for file, encoder in encoders.items():
            if file.exists() and not options.overwrite and file.read_bytes() != weights(encoder):
                raise UserError(f"{file} holds other weights; add --overwrite to replace them, or --to ANOTHER_FOLDER.")
        export_encoder(backbone, folder, facts)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{folder} cannot be written ({error.strerror}); give another one, --to FOLDER.", file=sys.stderr)
        return 2
    for file in encoders:
        print(file, file.with_suffix(".json"), sep="\n")
    print("", python_to_load(backbone, str(next(iter(encoders)))), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
