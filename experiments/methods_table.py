"""Write the table in icl_msr/methods/README.md from the code: python experiments/methods_table.py"""

import importlib
from pathlib import Path

from hydra import compose, initialize_config_dir

from icl_msr.core.config import config_dir

PAPERS = {
    "msr": {"simclr", "byol", "cmc", "swav", "debiased", "lmcl", "ressl"},  # ICL-MSR's tables
    "patch": {"moco"},  # Ge et al.
    "texture": {"moco"},
}
"""Pairs that the papers themselves report; how MSR and the negatives enter the other methods is ours."""

COLUMNS = [("regularizer", "msr"), ("negatives", "patch"), ("negatives", "texture")]
"""`cached` is as `texture`; `phase` is ours everywhere."""

README = Path(__file__).parents[1] / "icl_msr" / "methods" / "README.md"
BEGIN, END = "<!-- methods: written by experiments/methods_table.py -->", "<!-- end of methods -->"


def choices(group: str) -> list[str]:
    """The group's files, `none` left out."""
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml") if file.stem != "none")


def table() -> str:
    """Markdown: a row a method, a column a regularizer or kind of negatives; then why pairs are refused."""
    reasons: list[str] = []
    lines = [" | ".join(["| `method=`", "what", *(f"`{group}={name}`" for group, name in COLUMNS)]) + " |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for method in choices("method"):
            module, _, name = str(compose("config", [f"method={method}"]).method["_target_"]).rpartition(".")
            kind = getattr(importlib.import_module(module), name)
            title = str(importlib.import_module(kind.__module__).__doc__).strip().replace("\n", " ").rstrip(".")
            cells = [
                "refused" if group in kind.refuses else "paper" if method in PAPERS.get(column, ()) else "ours"
                for group, column in COLUMNS
            ]
            lines.append(" | ".join([f"| `{method}`", title, *cells]) + " |")
            reasons += [f"* `{method}` with a `{group}`: {reason}" for group, reason in kind.refuses.items()]
    return "\n".join([*lines, "", "Refused:", "", *reasons])


def written(readme: str) -> str:
    """README with the table of today."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
