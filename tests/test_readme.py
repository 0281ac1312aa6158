"""The pages say what the code has."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_methods_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "experiments" / "methods_table.py"))
    readme = (ROOT / "icl_msr" / "methods" / "README.md").read_text()
    assert script["written"](readme) == readme, "type: python experiments/methods_table.py"
