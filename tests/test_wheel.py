"""The wheel, installed where no checkout is: every command works from a folder that has nothing to do with it."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.tiny import DATA, MODEL

import icl_msr
from icl_msr.cli.processes import clean_environment
from icl_msr.core.config import config_dir

CHECKOUT = Path(icl_msr.__file__).parents[1]
SHORT = [*DATA, *MODEL, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "evaluation=light"]
SHORT += ["trainer.log_every_n_steps=1", "logger=csv"]

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """The interpreter of an environment that holds the wheel, and the tests' own environment for what it needs."""
    home = tmp_path_factory.mktemp("home")

    def call(*line: str | Path) -> "subprocess.CompletedProcess[str]":
        ours = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
        ours |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.run(line, env=ours, cwd=home / "elsewhere", capture_output=True, text=True, check=False)

    (home / "elsewhere").mkdir()
    pip = (sys.executable, "-m", "pip")
    made = call(*pip, "wheel", "--no-deps", "--wheel-dir", home, CHECKOUT)
    if made.returncode and "requirement hatchling" in made.stderr:
        pytest.skip("hatchling, which makes the wheel, cannot be had without a network")
    assert made.returncode == 0, made.stderr
    (wheel,) = home.glob("*.whl")
    environment = home / "environment"
    assert call(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    interpreter = environment / "bin" / "python"
    installed = call(*pip, "--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    # A path in a .pth file is searched last, and the .pth files there, such as that of the checkout, are not read.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return lambda *words: call(interpreter, *words)


@pytest.fixture(scope="module")
def elsewhere(python: Python) -> Path:
    return Path(python("-c", "import os; print(os.getcwd())").stdout.strip())


def succeeds(done: "subprocess.CompletedProcess[str]") -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_nothing_of_the_checkout_is_used(python: Python) -> None:
    where = "import icl_msr, hydra_plugins.icl_msr as p; from icl_msr.core.config import config_dir as c; "
    files = succeeds(python("-c", where + "print(icl_msr.__file__, p.__file__, c(), sep='\\n')")).split()
    assert all("environment" in Path(file).parts for file in files), files


@pytest.mark.slow
def test_all_of_the_config_is_there(python: Python) -> None:
    shown = succeeds(python("-m", "icl_msr.run", "--help"))
    for group in [
        path for path in config_dir().iterdir() if path.is_dir() and path.name not in ("hydra", "experiment")
    ]:
        assert f"{group.name}: {', '.join(sorted(file.stem for file in group.glob('*.yaml')))}" in shown
    config = yaml.safe_load(succeeds(python("-m", "icl_msr.run", "--cfg", "job", "experiment=cifar10/simclr")))
    assert config["dataset"]["_target_"] == "icl_msr.data.torchvision_sets.cifar10"


@pytest.mark.slow
def test_a_run_its_encoder_and_its_report(python: Python, elsewhere: Path) -> None:
    succeeds(python("-m", "icl_msr.run", *SHORT, "hydra.run.dir=run"))
    assert json.loads((elsewhere / "run" / "results.json").read_text())["final"]["loss"] > 0
    assert json.loads((elsewhere / "run" / "environment.json").read_text())["commit"] is None
    succeeds(python("-m", "icl_msr.run", "resume=run", "trainer.max_epochs=2"))
    again = succeeds(python("-m", "icl_msr.evaluate", "run=run", "evaluation=light"))
    assert "results  runs/" in again
    assert "load_file" in succeeds(python("-m", "icl_msr.export", "run", "--to", "exported"))
    assert os.listdir(elsewhere / "exported")
    assert "run/report.html" in succeeds(python("-m", "icl_msr.report", "run"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["serial", "process"])
def test_a_sweep(launcher: str, python: Python, elsewhere: Path) -> None:
    words = ("-m", "method=simclr,moco", f"hydra/launcher={launcher}", f"hydra.sweep.dir={launcher}")
    succeeds(python("-m", "icl_msr.run", *SHORT, *words))
    assert len(list((elsewhere / launcher).glob("*/results.json"))) == 2


@pytest.mark.slow
def test_a_mistake(python: Python) -> None:
    done = python("-m", "icl_msr.run", "method=mocco")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("method=mocco does not exist; did you mean moco")
