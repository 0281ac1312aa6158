"""`python -m icl_msr.run method=moco regularizer=msr`: compose, check, pre-train, evaluate, report."""

import sys
from typing import TYPE_CHECKING

from icl_msr.core.terminal import answering

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from icl_msr.core.config import Settings


def run(settings: "Settings", config: "DictConfig") -> float:
    """Run `icl_msr.cli.job.run`, which brings torch along: seconds that a help text or a mistake need not wait for."""
    from icl_msr.cli import job

    return job.run(settings, config)


@answering
def main() -> int:
    """Run the command line, and return the exit code."""
    from icl_msr.cli import command  # brings Hydra along

    return command.main(run)


if __name__ == "__main__":
    sys.exit(main())
