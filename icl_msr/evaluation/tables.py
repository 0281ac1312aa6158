"""What the report's tables do not show of an evaluation, for the terminal."""

from rich.table import Table

from icl_msr.evaluation.suite import Results


def tables(results: Results) -> list[Table]:
    """One for each kind of measure that was taken."""
    return [table for table in (health_table(results),) if table is not None]


def _table(title: str, *left: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in left:
        table.add_column(column, no_wrap=True)
    return table


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def health_table(results: Results) -> Table | None:
    """How well each encoder uses its space; None where that was not measured."""
    if not results.health:
        return None
    table = _table("Representation", "encoder", "images of")
    for column in ("n", "channels", "effective\nrank", "std\n(1 spread)", "uniformity"):
        table.add_column(column, justify="right")
    for row in results.health:
        cells = (str(row["n"]), str(row["channels"]), _number(row["effective_rank"], 1))
        table.add_row(
            row["encoder"], row["split"], *cells, _number(row["feature_std"], 2), _number(row["spread"], 2),
            style="dim" * (row["encoder"] == "untrained"),
        )  # fmt: skip
    return table
