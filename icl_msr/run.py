"""`python -m icl_msr.run method=moco regularizer=msr`: compose, check, pre-train, evaluate, report."""

import sys

from omegaconf import DictConfig

from icl_msr.cli.command import main
from icl_msr.core.config import Settings


def run(settings: Settings, config: DictConfig) -> float:
    """Run `icl_msr.cli.job.run`, which brings torch along: seconds that a help text or a mistake need not wait for."""
    from icl_msr.cli import job

    return job.run(settings, config)


if __name__ == "__main__":
    sys.exit(main(run))
