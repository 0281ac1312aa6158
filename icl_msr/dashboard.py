"""`python -m icl_msr.dashboard --to FOLDER`: the dashboards of Weights & Biases for the runs of this program."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded, require_local
from icl_msr.core.terminal import Arguments, answering
from icl_msr.core.trust import leave_working_directory


@answering
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write and save the dashboards, and return the exit code."""
    parser = Arguments(
        prog="python -m icl_msr.dashboard",
        description="Writes two workspaces of Weights & Biases, for one run and for a sweep, and a report as JSON, and "
        "saves them in the project if somebody is logged in. WANDB_MODE=offline only writes them.",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT") or "icl-msr", help="default: icl-msr")
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY") or "", help="default: your own")
    options = parser.parse_args(arguments)
    leave_working_directory(())
    require_local(options.to, "--to")
    try:
        from icl_msr.cli import boards  # brings wandb and torch along
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "wandb_workspaces":
            raise
        raise UserError(
            "icl_msr.dashboard needs wandb-workspaces, which is not installed; type: pip install 'icl-msr[wandb]'."
        ) from None
    made = boards.build(options.project, options.entity)
    for file in boards.write(made, expanded(options.to)):
        print(file)
    boards.save(made.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
