import subprocess
import sys
from pathlib import Path


def test_the_example_runs_as_it_stands():
    file = Path(__file__).parents[2] / "experiments" / "examples" / "negatives.py"
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    losses = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert losses.keys() == {"patch", "texture", "phase"}
    assert len(set(losses.values())) == 3
