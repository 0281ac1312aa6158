"""Reports: a page for one run, and tables with means, standard deviations and plots for many runs.

python -m icl_msr.report PATH...
"""

from pathlib import Path

from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import atomic_write
from icl_msr.report.output import print_summary, send, write_summary
from icl_msr.report.page import run_page
from icl_msr.report.runs import Run
from icl_msr.report.summary import Summary, summarise
from icl_msr.report.tables import tables

__all__ = ["Summary", "has_page", "print_summary", "send", "summarise", "tables", "write_report", "write_summary"]


def has_page(run: Path) -> bool:
    """Return whether the folder of a run holds a complete `report.html`."""
    file = run / "report.html"
    return file.is_file() and file.read_bytes().rstrip().endswith(b"</html>")


def write_report(run: Path) -> Path:
    """Write the self-contained `report.html` of a finished run into its folder, and return its path.

    Raises:
        UserError: the folder has no readable `results.json`.
    """
    file = run / "report.html"
    atomic_write(file, run_page(Run.load(run)), RunFolder(run).advice)
    return file
