"""`python -m icl_msr.export RUN`."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl_msr.checkpoint import by_file, export_encoder, python_to_load, read_checkpoint, weights
from icl_msr.config import build
from icl_msr.encoders import Backbone
from icl_msr.errors import UserError
from icl_msr.folder import RunFolder
from icl_msr.methods import Method

ENCODERS = {"online": "method.backbone.", "momentum": "method.momentum_encoder.backbone."}
"""Where a checkpoint keeps them."""


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


def rebuild(run: RunFolder, encoder: str) -> tuple[Backbone, dict[str, Any]]:
    """An encoder of a run's last checkpoint, and what encoder.json says of it.

    Raises:
        UserError: there is no such run, checkpoint or encoder, or they do not fit.
    """
    if not run.begun:
        raise UserError(f"{run} is no run: it holds no config.yaml; give the folder of a run that has begun to train.")
    saved = read_checkpoint(run.checkpoint)["state_dict"]
    prefix = ENCODERS[encoder]
    state = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    if not state:
        raise UserError(f"The method of {run} has no {encoder} encoder; type --encoder online.")
    try:
        facts = run.facts()
        about = {**facts["images"], "choices": facts["choices"], "icl_msr": facts["icl_msr"], "encoder": encoder}
    except (OSError, ValueError, KeyError):
        raise UserError(f"{run.environment} does not say what images the encoder takes; repeat the run.") from None
    try:
        config, images = run.saved_config(), facts["images"]
        node: Mapping[str, Any] = config["backbone"]
        untrained = {**node, "weights": None} if "weights" in node else node
        plain = build(untrained, images["image_size"])
        # The method may make its own encoder of it; how many classes there are matters to no encoder.
        method: Method = build(config["method"], plain, 2, images["mean"], images["std"])
        backbone = method.backbone
        backbone.load_state_dict(state)
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".: ")
        raise UserError(
            f"The encoder cannot be rebuilt from {run.config} ({reason}); put the config or the package back that the "
            "run was trained with."
        ) from error
    return backbone, about


if __name__ == "__main__":
    sys.exit(main())
