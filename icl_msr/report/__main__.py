"""The command `python -m icl_msr.report PATH...`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from icl_msr.core.errors import UserError, reason
from icl_msr.core.storage import require_local
from icl_msr.core.terminal import Arguments, answering, plain_console
from icl_msr.core.trust import leave_working_directory
from icl_msr.report import print_summary, send, summarise, tables, words, write_report, write_summary
from icl_msr.report.runs import Run, is_run


@answering
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the reports, and return the exit code."""
    parser = Arguments(
        prog="python -m icl_msr.report",
        description="One run folder: write its report.html. A sweep folder or several folders: one table over all "
        "runs inside, mean and standard deviation over seeds, and what differs by how much, as summary.csv, .md, .tex, "
        ".json and report.html.",
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a run folder, or a folder with runs at any depth"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the summary goes (default: the first folder given)"
    )
    parser.add_argument(
        "--against",
        metavar="LABEL",
        help="what all rows are compared with (default: for each, the row with none in place of what it adds)",
    )
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="send the tables of several runs to this project of Weights & Biases as well"
    )
    options = parser.parse_args(arguments)
    leave_working_directory(())
    try:
        _report(options.paths, options.out, options.against, options.wandb)
    except OSError as error:
        where = error.filename or options.out or options.paths[0]
        raise UserError(f"{where} cannot be written ({reason(error)}); give another folder, --out DIR.") from None
    return 0


def _report(paths: list[Path], out: Path | None, against: str | None, project: str | None) -> None:
    # A pipe or a log file has no width of its own.
    console = plain_console(width=None if sys.stdout.isatty() else 120, soft_wrap=False)
    if len(paths) == 1 and out is None and is_run(paths[0]):
        if project:
            raise UserError("--wandb sends tables of several runs; a single run is sent by logger=wandb as it trains.")
        written = [write_report(paths[0])]
        outcome = Run.load(paths[0]).outcome
        for table in tables(outcome):
            if not table.folded:
                console.print(table.rich())
        console.print("\n" + " ".join(words.answer(outcome)))
    else:
        summary = summarise(paths, against)
        print_summary(summary, console)
        # The summary goes beside the runs, so that it never overwrites a run's own page.
        require_local(out or "", "--out")
        folder = out or (paths[0].parent if is_run(paths[0]) else paths[0])
        written = write_summary(summary, folder)
        if project:
            send(summary, folder, project)
    for file in written:
        console.print(str(file), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
