"""Write the table of icl_msr/methods/README.md from the code.

python experiments/methods_table.py [--check]
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

from icl_msr.core.config import config_dir

PAPER = {"msr": {"simclr"}, "patch": {"moco"}, "texture": {"moco"}}
PAPER |= {"hcl": {"debiased"}, "mochi": {"moco"}, "synco": {"moco"}}
"""Pairs that a paper gives the formula of."""

REPORTED = {"msr": {"byol", "cmc", "swav", "debiased", "lmcl", "ressl"}}
"""Pairs that a paper only reports numbers of. Their formula is ours, and so are all other combinations."""

COLUMNS = [("regularizer", "msr"), ("negatives", "patch"), ("negatives", "texture")]
COLUMNS += [("hard_negatives", "hcl"), ("hard_negatives", "mochi"), ("hard_negatives", "synco")]
"""`cached` counts as `texture`. `phase` is ours in every method."""

SYNTHETIC = ("mochi", "synco")
"""Hard negatives that are made from others."""

PAGE = Path(__file__).parents[1] / "icl_msr" / "methods" / "README.md"
BEGIN, END = "<!-- methods: written by experiments/methods_table.py -->", "<!-- end of methods -->"


def choices(group: str) -> list[str]:
    """Return the names of the group's files, without `none`."""
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml") if file.stem != "none")


def table() -> str:
    """Return Markdown: one row per method, one column per regularizer or negatives, then the reasons of refusals."""
    reasons: dict[str, list[str]] = {}
    lines = [" | ".join(["| `method=`", "what", *(f"`{group}={name}`" for group, name in COLUMNS)]) + " |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for method in choices("method"):
            module, _, name = str(compose("config", [f"method={method}"]).method["_target_"]).rpartition(".")
            kind = getattr(importlib.import_module(module), name)
            title = str(importlib.import_module(kind.__module__).__doc__).strip().replace("\n", " ").rstrip(".")
            cells = [
                "refused"
                if group in kind.refuses or (column in SYNTHETIC and "synthetic" in kind.refuses)
                else "paper"
                if method in PAPER.get(column, ())
                else "reported"
                if method in REPORTED.get(column, ())
                else "ours"
                for group, column in COLUMNS
            ]
            lines.append(" | ".join([f"| `{method}`", title, *cells]) + " |")
            for group, reason in kind.refuses.items():
                shown = "synthetic hard negative" if group == "synthetic" else f"`{group}`"
                reasons.setdefault(f"with a {shown}: {reason}", []).append(f"`{method}`")
    refused = [f"* {', '.join(methods)} {reason}" for reason, methods in reasons.items()]
    return "\n".join([*lines, "", "Refused:", "", *refused])


def written(page: str) -> str:
    """Return the page with the current table."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main(words: Sequence[str] | None = None) -> None:
    """Write the table, or with `--check` fail if the page has a different one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the page has another table"
    )
    page = PAGE.read_text()
    if not parser.parse_args(words).check:
        PAGE.write_text(written(page))
    elif page != written(page):
        raise SystemExit(
            "The table in icl_msr/methods/README.md is out of date; type python experiments/methods_table.py"
        )


if __name__ == "__main__":
    main()
