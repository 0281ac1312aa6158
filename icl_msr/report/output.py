"""Output of summaries to the terminal, to files and to W&B."""

import json
import os
import re
import sys
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icl_msr.core.storage import atomic_write
from icl_msr.core.tables import Table
from icl_msr.report.differences import compare
from icl_msr.report.page import summary_page
from icl_msr.report.summary import Statistic, Summary, overlays
from icl_msr.report.summary_tables import dataset_tables, everything, flat_differences, flat_summary

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(summary: Summary, console: "Console") -> None:
    """Print the tables of each data set, and what failed."""
    from rich.text import Text

    for dataset in summary.by_dataset():
        for table in dataset_tables(summary, dataset):
            console.print(table.rich(roomy=True))
            console.print(Text(table.note, style="dim"))
    for trial in summary.best:
        console.print(f"Best trial: {trial}", markup=False, soft_wrap=True)
    for failed in summary.failed:
        console.print(Text(f"missing: {failed.path}: {failed.reason}", style="red"))
    for path in summary.superseded:
        console.print(Text(f"left out: {path}: a newer run has the same configuration and seed", style="dim"))


def write_summary(summary: Summary, folder: Path) -> list[Path]:
    """Write `summary.csv`, `.md`, `.json`, `report.html` and `summary.tex` into the folder, and return their paths.

    Maps over the same images, if there are any, become pictures such as `grad-cam-confounded.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, dict[str, Path]] = {}
    for dataset, rows in summary.by_dataset().items():
        for kind, figure in overlays(rows).items():
            file = folder / (re.sub(r"\W+", "-", f"{kind} {dataset}").lower() + ".png")
            drawn = BytesIO()
            figure.savefig(drawn, format="png", dpi=220)  # for slides
            atomic_write(file, drawn.getvalue())
            pictures.setdefault(dataset, {})[kind] = file
    contents = {
        "summary.csv": flat_summary(summary).csv(),
        "summary.md": as_markdown(summary),
        "summary.json": as_json(summary),
        "report.html": summary_page(summary, folder.resolve(), pictures),
        "summary.tex": as_latex(summary),
    }
    for name, content in contents.items():
        atomic_write(folder / name, content)
    return [*(folder / name for name in contents), *(file for found in pictures.values() for file in found.values())]


def send(summary: Summary, folder: Path, project: str) -> None:
    """Send the summary to W&B as tables of a new run; offline if nobody is logged in, or W&B cannot be reached."""
    home = folder / "wandb"
    home.mkdir(exist_ok=True)
    os.environ |= {"WANDB_DATA_DIR": str(home), "WANDB_CACHE_DIR": str(home / "cache")}
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    begin = partial(
        wandb.init,
        project=project,
        name="summary",
        job_type="summary",
        config={"folder": str(folder)},
        dir=folder,
        settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
        reinit="create_new",
    )
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    try:
        run = begin(mode=mode)
    except Exception as error:
        print(f"W&B cannot be reached ({error}); the summary is kept offline.", file=sys.stderr)
        wandb.teardown()
        run = begin(mode="offline")
    for table in (flat_summary(summary), flat_differences(summary)):
        if table.lines:
            run.log({table.name: wandb.Table(columns=list(table.heads), data=table.data, allow_mixed_types=True)})
    run.finish(exit_code=0)


def as_json(summary: Summary) -> str:
    """Return the whole summary as JSON, with single values in the order of the seeds."""
    content = {
        "configurations": [
            {
                "dataset": configuration.dataset,
                "labels": configuration.labels,
                "runs": [str(run.path) for run in configuration.runs],
                "seeds": [run.outcome.seed for run in configuration.runs],
                "metrics": [_named(record) | _plain(found) for record, found in configuration.metrics.items()],
            }
            for configuration in summary.configurations
        ],
        "differences": [
            {
                "dataset": dataset,
                "labels": row.configuration.labels,
                "against": row.against.labels,
                "differences": [
                    _named(record) | asdict(difference) | {"real": difference.real}
                    for record, difference in row.differences.items()
                ],
            }
            for dataset, rows in summary.by_dataset().items()
            for row in compare(rows, everything(rows), summary.against)
        ],
        "two_by_two": [
            {"dataset": joined.dataset, "labels": joined.labels, "classifier": str(joined.classifier)}
            | {f"{trained}/{tested}": _plain(found) for (trained, tested), found in joined.cells.items()}
            for joined in summary.two_by_two
        ],
        "failed": [{"path": str(failed.path), "reason": failed.reason} for failed in summary.failed],
        "best": [asdict(trial) for trial in summary.best],
        "superseded": [str(path) for path in summary.superseded],
    }
    return json.dumps(content, indent=2) + "\n"


def _named(record: Any) -> dict[str, Any]:
    return {"name": record.name, "kind": record.kind} | {k: v for k, v in record.row().items() if k != "value"}


def _plain(found: Statistic) -> dict[str, Any]:
    return {"mean": found.mean, "std": found.std, "n": found.n, "values": found.values}


def as_markdown(summary: Summary) -> str:
    """Return the tables of `print_summary` as Markdown."""
    parts = [table.markdown() for table in _tables(summary)]
    parts += [f"Best trial: {trial.reached} in `{trial.folder}` with `{trial.chosen}`" for trial in summary.best]
    if summary.failed:
        parts.append("### Missing\n\n" + "\n".join(f"* `{failed.path}`: {failed.reason}" for failed in summary.failed))
    return "\n\n".join(parts) + "\n"


def as_latex(summary: Summary) -> str:
    """Return the tables of `print_summary` as LaTeX, each in one environment that needs booktabs."""
    tables = [table.latex(f"{table.title}: {table.note}") for table in _tables(summary)]
    return "\n\n".join([r"% \usepackage{booktabs}", *tables]) + "\n"


def _tables(summary: Summary) -> list[Table]:
    return [table for dataset in summary.by_dataset() for table in dataset_tables(summary, dataset)]
