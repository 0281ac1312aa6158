"""`python -m icl_msr.run method=moco regularizer=msr`: compose, check, pre-train, evaluate, report."""

import sys

from icl_msr.cli.command import main
from icl_msr.cli.job import run

if __name__ == "__main__":
    sys.exit(main(run))
