"""What a command imports before it has something to do: torch takes seconds, Lightning and torchvision more of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "torchvision", "pytorch_lightning", "lightning_fabric", "matplotlib", "scipy", "wandb", "timm"}


def imported(folder: Path, *words: str, code: int) -> set[str]:
    """The packages that `python -m <words>` imports."""
    line = [sys.executable, "-X", "importtime", "-m", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("icl_msr.run --help", 0),
        ("icl_msr.run --cfg job method=byol", 0),
        ("icl_msr.run method=mocco", 2),
        ("icl_msr.run --sead=3", 2),
        ("icl_msr.run method.temprature=0.2", 2),
        ("icl_msr.run sead=3", 2),
        ("icl_msr.run resume=nowhere", 2),
        ("icl_msr.export --help", 0),
        ("icl_msr.textures --help", 0),
        ("icl_msr.textures --to folder negatives=textur", 2),
        ("icl_msr.shards --help", 0),
        ("icl_msr.shards --to folder dataset=image", 2),
    ],
)
def test_help_and_wrong_names_need_no_torch(line: str, code: int, tmp_path: Path) -> None:
    found = imported(tmp_path, *line.split(), code=code)
    assert "hydra" in found or line.split()[0] == "icl_msr.export" or (line.endswith("--help") and "run" not in line)
    assert not found & HEAVY
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word", ["+method.foo=1", "method.temperature=-1", "+regularizer.foo=1", "+optimizer.foo=1", "+schedule.foo=1"]
)
def test_a_wrong_key_of_what_learns_needs_torch_alone(word: str, tmp_path: Path) -> None:
    found = imported(tmp_path, "icl_msr.run", word, code=2)
    assert found & HEAVY <= {"torch"}
