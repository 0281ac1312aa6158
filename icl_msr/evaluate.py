"""`python -m icl_msr.evaluate`: any encoder, ours or foreign, on any data set, with any evaluation.

python -m icl_msr.evaluate run=FOLDER dataset=imagefolder dataset.root=photos evaluation=[default,corruptions]
"""

import argparse
import sys
from collections.abc import Sequence

from icl_msr.cli.processes import hold_leash, told
from icl_msr.core import trust
from icl_msr.core.errors import UserError
from icl_msr.core.ranks import adopt
from icl_msr.core.terminal import Arguments, answering

USAGE = """python -m icl_msr.evaluate SOURCE [dataset=...] [evaluation=...] [seed=N] [to=FOLDER]

  run=FOLDER                     a run's encoder, on the run's own data set unless another is given
  checkpoint=FILE                the encoder of one checkpoint in a run's folder
  encoder=FILE.safetensors       an exported encoder, with its .json beside it
  encoder=timm:NAME              a model of timm or
  encoder=torchvision:NAME       torchvision, with its own weights
    weights=null|FILE              or with random ones (see seed), or with those in a file
  trust=PACKAGE                  let a run's config name code of this package of yours
"""
EPILOG = """dataset=, evaluation= and hardware= name files of conf/ and take their keys, as in python -m icl_msr.run;
evaluation=[default,corruptions] does both. Features are kept in cache=FOLDER (default .cache/icl-msr/features; null:
nowhere). The results go to to=FOLDER (default runs/<date>/<time>-evaluate-<encoder>), where python -m icl_msr.report
finds them beside runs."""


@answering
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate; returns the exit code."""
    parser = Arguments(
        prog="python -m icl_msr.evaluate",
        usage=USAGE,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures any encoder, ours or foreign, on any data set.",
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as above")
    hold_leash()
    words: list[str] = parser.parse_args(arguments).words
    try:
        adopt()
        # They bring torch along: seconds that a help text need not wait for.
        from icl_msr.cli.evaluating import carry_out
        from icl_msr.cli.order import read

        trust.leave_working_directory(words)
        return carry_out(read(trust.given(words)), words)
    except Exception as fault:
        if not isinstance(fault, UserError) and told(fault):
            return 1
        raise


if __name__ == "__main__":
    sys.exit(main())
