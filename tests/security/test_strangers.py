"""Folders from strangers: each attack in each command that takes a folder.

Nothing may be executed, read from elsewhere or written elsewhere, and a refusal is one sentence with exit code 2.
`python tests/security/test_strangers.py` prints the table.
"""

import base64
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from support.inprocess import execute, finish
from support.tiny import DATA, MODEL

from icl_msr import evaluate, export
from icl_msr.cli import assemble, evaluating, job
from icl_msr.core.config import Settings, build
from icl_msr.core.folder import RunFolder
from icl_msr.report import __main__ as report

CANARY = "canary-7f3a"
"""What stands in a file and in an environment variable that belong to the user."""

EVIL = "open({marker!r}, 'w').close()\ndef touch(*_, **__):\n    open({marker!r}, 'w').close()\n"


class Place(NamedTuple):
    """Where an attack takes place."""

    run: Path
    """The stranger's folder, in the working directory."""
    home: Path
    """The user's folder, which is neither read nor written."""
    marker: Path
    """A file that is there once the stranger's code was executed."""


LETTERS = "abcdefghijklmnopqrstuvwx"

Attack = Callable[[Place], None]


def config(change: Callable[[dict[str, Any], Place], Any]) -> Attack:
    """An attack by values of the config."""

    def attack(place: Place) -> None:
        content: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(place.run / "config.yaml"))  # type: ignore[assignment]
        change(content, place)
        (place.run / "config.yaml").write_text(json.dumps(content))  # JSON is YAML, and without aliases

    return attack


def node(key: str, target: str, **keys: Any) -> Attack:
    """An attack by a node; `MARKER`, `RUN` and `HOME` stand for paths."""

    def change(content: dict[str, Any], place: Place) -> None:
        text = json.dumps({"_target_": target, **keys})
        for name in Place._fields:
            text = text.replace(name.upper(), str(getattr(place, name)))
        *path, last = key.split(".")
        inside = content
        for name in path:
            inside = inside.setdefault(name, {})
        inside[last] = json.loads(text)

    return config(change)


def value(key: str, text: str) -> Attack:
    """An attack by a value."""

    def change(content: dict[str, Any], place: Place) -> None:
        *path, last = key.split(".")
        inside = content
        for name in path:
            inside = inside[name]
        inside[last] = text.replace("HOME", str(place.home))

    return config(change)


def whole(text: str) -> Attack:
    """An attack by the text of the config."""
    return lambda place: (place.run / "config.yaml").write_text(text.replace("MARKER", str(place.marker)))


def link(name: str, target: str) -> Attack:
    """An attack by a link in place of a file, to a file or folder of the user's."""

    def attack(place: Place) -> None:
        path = place.run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target if target.startswith("/") else place.home / target)

    return attack


def pipe(name: str) -> Attack:
    """An attack by a pipe in place of a file: who reads it waits for ever."""

    def attack(place: Place) -> None:
        (place.run / name).unlink()
        os.mkfifo(place.run / name)

    return attack


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def pickled(place: Place) -> None:
    file = place.run / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(file, weights_only=True), "x": Bomb(place.marker)}, file)


def compressed(place: Place) -> None:
    """Few bytes that become many."""
    file = place.run / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(50_000_000))


def recipe(place: Place) -> None:
    about = json.loads((place.run / "encoder.json").read_text())
    code = EVIL.format(marker=str(place.marker))
    about |= {"recipe": {"builder": "builtins.exec", "source": code}, "load": code}
    (place.run / "encoder.json").write_text(json.dumps(about))


def captions(place: Place) -> None:
    named = {str(place.home / "secret.png"): "a", "../../home/secret.png": "b"}
    (place.run / "figures" / "captions.json").write_text(json.dumps(named))


def choices(place: Place) -> None:
    """Words for Hydra in place of the names of choices."""
    (place.home / "conf" / "method").mkdir(parents=True)
    facts = json.loads((place.run / "environment.json").read_text())
    facts["choices"] |= {"hydra.searchpath": f"[file://{place.home}/conf]", "dataset": "../../home/secret"}
    facts["choices"] |= {"metric": "${oc.env:CANARY}", "optimizer": "${run_folder:" + str(place.home) + "/new,a}"}
    (place.run / "environment.json").write_text(json.dumps(facts))


ATTACKS: dict[str, Attack] = {
    # Code
    "hydra.callbacks: exec": node("hydra.callbacks.a", "builtins.exec", _args_=["open('MARKER', 'w')"]),
    "hydra.callbacks: a module in the folder": node("hydra.callbacks.a", "run.evil.touch"),
    "method: a module beside": node("method", "evil.touch"),
    "backbone: a module in the folder": node("backbone", "run.evil.touch"),
    "dataset: os.system": node("dataset", "os.system", _args_=["touch MARKER"]),
    "backbone: builtins.exec": node("backbone", "builtins.exec", _args_=["open('MARKER', 'w')"]),
    "optimizer: torch.hub.load": node("optimizer", "torch.hub.load", _args_=["RUN", "touch"], source="local"),
    "method: torch.hub.load": node("method", "torch.hub.load", _args_=["RUN", "touch"], source="local"),
    "backbone: torch.load": node("backbone", "torch.load", _args_=["RUN/bomb.pth"], weights_only=False),
    "dataset: pkgutil": node("dataset", "pkgutil.resolve_name", name="evil:touch"),
    "callbacks: subprocess": node("callbacks.a", "subprocess.check_call", _args_=[["touch", "MARKER"]]),
    "logger: a module beside": node("logger.a", "evil.touch"),
    "method: a method of a class": node("method", "icl_msr.methods.MoCo.load_state_dict", _args_=["MARKER"]),
    "backbone: what a module imports": node("backbone", "icl_msr.models.backbones.json.loads", _args_=["{}"]),
    "augment: a private function": node("augment", "icl_msr.negatives.texture._plan"),
    "nested: exec": node("method.x", "builtins.exec", _args_=["open('MARKER', 'w')"]),
    "nested: half a call": node("optimizer.x", "evil.touch", _partial_=True),
    "nested: in arguments": node("backbone", "icl_msr.models.backbones.tiny", _args_=[{"_target_": "evil.touch"}]),
    "nested: bias_and_norm": node("bias_and_norm.lr", "evil.touch"),
    "nested: profiler": node("trainer.profiler", "run.evil.touch"),
    "nested: loader": node("loader.batch_size", "evil.touch"),
    "tags of YAML": whole("method: !!python/object/apply:os.system ['touch MARKER']\n"),
    "a pickle as checkpoint": pickled,
    "a recipe in encoder.json": recipe,
    # Reading
    "a variable of the environment": value("metric", "${oc.env:CANARY}"),
    "a variable, in the seed": value("seed", "${oc.decode:${oc.env:CANARY}}"),
    "a variable, in the data set": value("dataset.cache", "HOME/${oc.env:CANARY}"),
    "config.yaml: a link": link("config.yaml", "secret.json"),
    "environment.json: a link": link("environment.json", "secret.json"),
    "results.json: a link": link("results.json", "secret.json"),
    "metrics.csv: a link": link("metrics.csv", "secret.json"),
    "encoder.json: a link": link("encoder.json", "secret.json"),
    "a picture: a link": link("figures/z.png", "secret.png"),
    "captions of files elsewhere": captions,
    # Writing
    "hydra.run.dir": config(lambda content, place: content.update(hydra={"run": {"dir": f"{place.home}/new"}})),
    "a resolver that makes folders": value("metric", "${run_folder:HOME/new,a}"),
    "a checkpoint elsewhere": node(
        "callbacks.a", "pytorch_lightning.callbacks.ModelCheckpoint", dirpath="HOME/new", every_n_train_steps=1
    ),
    "a logger elsewhere": node("logger.a", "pytorch_lightning.loggers.CSVLogger", save_dir="HOME/new"),
    "a logger beside": node("logger.a", "pytorch_lightning.loggers.CSVLogger", name="../../home/new"),
    "the trainer's folder": value("trainer.default_root_dir", "HOME/new"),
    "a cache elsewhere": value("dataset.cache", "HOME/new"),
    "choices that are no names": choices,
    "checkpoints: a link": link("checkpoints/x", "folder"),
    "figures: a link": link("figures", "folder"),
    "a link where a file is begun": link(".encoder.safetensors.tmp", "precious"),
    "another one": link(".report.html.tmp", "precious"),
    # Time and memory
    "aliases of YAML": whole("a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{b}, *{b}]\n" for b, c in pairwise(LETTERS))),
    "references that double": whole("a: xx\n" + "".join(f"{c}: ${{{b}}}${{{b}}}\n" for b, c in pairwise(LETTERS))),
    "deep nesting": whole("a: " + "[" * 20_000 + "]" * 20_000),
    "a long config": whole("a: " + "x" * 3_000_000),
    "config.yaml: a pipe": pipe("config.yaml"),
    "environment.json: a pipe": pipe("environment.json"),
    "results.json: a pipe": pipe("results.json"),
    "encoder.safetensors: a pipe": pipe("encoder.safetensors"),
    "config.yaml: a device": link("config.yaml", "/dev/zero"),
    "a compressed checkpoint": compressed,
}  # fmt: skip


# The commands, which stop before they train or measure


def stop(*given: Any) -> float:
    """In place of `job.carry_out`: what comes before training."""
    settings, _, plan, pieces, folder, console = given
    job.resume_point(settings, pieces, folder, console)
    assemble.make_trainer(settings, plan, folder, pieces)
    facts = job.describe(settings, plan, pieces.dataset, folder)
    assemble.make_optimization(settings)
    assemble.make_loggers(settings, folder, job.about(settings, plan, pieces, facts, None))
    return 0.0


def measure_nothing(order: Any, words: Any, plan: Any) -> None:
    """In place of `evaluating.evaluate`: what comes before measuring."""
    dataset = build(order.settings.dataset)
    order.subject.fitting(dataset.image_size, 0)


def read_only(settings: Settings, config: Any) -> float:
    """In place of `job.run`: what reads folders."""
    build(settings.backbone, image_size=32)
    for node in settings.evaluation.values():
        build(node).subject.fitting(32, 0)
    return 0.0


SMALL = [*DATA, *MODEL, "logger=csv", "hardware=cpu", "hydra.run.dir=mine"]


def resume(run: str) -> int:
    with patch.object(job, "carry_out", stop):
        answer = execute(f"resume={run}", "trainer.max_epochs=9")
    print(answer.err, end="", file=sys.stderr)
    print(answer.out)
    return answer.code


def new_run(*words: str) -> int:
    answer = execute(*SMALL, *words, job=read_only)
    print(answer.err, end="", file=sys.stderr)
    print(answer.out)
    return answer.code


def measured(*words: str) -> int:
    with patch.object(evaluating, "evaluate", measure_nothing):
        return evaluate.main([*words, "to=mine", "cache=null", "evaluation=light", "hardware=cpu"])


COMMANDS: Mapping[str, Callable[[str], int]] = {
    "run resume=": resume,
    "evaluate run=": lambda run: measured(f"run={run}"),
    "evaluate checkpoint=": lambda run: measured(f"checkpoint={run}/checkpoints/last.ckpt"),
    "export": lambda run: export.main([run, "--overwrite"]),
    "backbone.weights=": lambda run: new_run("evaluation=none", f"backbone.weights={run}"),
    "evaluation.other=": lambda run: new_run("evaluation=similarity", f"evaluation.other={run}"),
    "report": lambda run: report.main([run]),
}


class Outcome(NamedTuple):
    """How a command ended that was given a stranger's folder."""

    code: int | None
    """None: it had to be killed."""
    out: str
    err: str
    harm: tuple[str, ...]

    def __str__(self) -> str:
        if self.harm:
            return ", ".join(self.harm).upper()
        return {0: "harmless", 2: "refused", None: "HANGS"}.get(self.code, f"EXIT {self.code}")

    @property
    def right(self) -> bool:
        said = len(self.err.splitlines()) == 1 if self.code == 2 else self.code == 0
        return said and not self.harm


def tried(template: Path, folder: Path, attack: Attack, command: Callable[[str], int]) -> Outcome:
    """Make the stranger's folder, give it to the command in a forked process, and see what came of it."""
    place = Place(folder / "work" / "run", folder / "home", folder / "marker")
    shutil.copytree(template, place.run)
    code = EVIL.format(marker=str(place.marker))
    for file in ("work/evil.py", "work/run/evil.py", "work/run/hubconf.py", "work/yaml_.py"):
        (folder / file).write_text(code)
    torch.save(Bomb(place.marker), place.run / "bomb.pth")
    (place.home / "folder").mkdir(parents=True)
    (place.home / "secret.json").write_text(json.dumps({CANARY: CANARY, "format": 2, "seed": 0}))
    (place.home / "secret.png").write_text(CANARY)
    (place.home / "precious").write_text("precious")
    attack(place)
    before = listed(folder)
    process = multiprocessing.get_context("fork").Process(target=child, args=(folder, command))
    process.start()
    process.join(60)
    code_or_none = process.exitcode
    if process.is_alive():
        process.kill()
        code_or_none = None
    after = listed(folder)
    out, err = ((folder / name).read_text() if (folder / name).exists() else "" for name in ("out", "err"))
    harm = {
        "executed": place.marker.exists(),
        "read": CANARY in readable(place) + out + err,
        "wrote": any(after.get(n) != before.get(n) for n in {*before, *after} if not n.startswith(ALLOWED)),
    }
    return Outcome(code_or_none, out, err, tuple(name for name, happened in harm.items() if happened))


ALLOWED = ("work/run", "work/mine", "work/.cache", "out", "err", "marker")
"""Where a command may write."""


def listed(folder: Path) -> dict[str, bytes]:
    """Every file and folder, links not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in sorted(folder.rglob("*"))
    }


def readable(place: Place) -> str:
    """All that the command has written, pictures in pages too; what the attack itself put there names no canary."""
    text = ""
    for path in [*place.run.rglob("*"), *(place.run.parent / "mine").rglob("*")]:
        if path.is_file() and not path.is_symlink() and path.suffix in (".html", ".csv", ".json", ".yaml", ".md"):
            text += path.read_text(errors="replace")
    pictures = [base64.b64decode(part) for part in re.findall(r"base64,([A-Za-z0-9+/=]+)", text)]
    return text + "".join(picture.decode(errors="replace") for picture in pictures)


def child(folder: Path, command: Callable[[str], int]) -> None:
    """As `python -m` would start it: the working directory stands first on the path of imports."""
    os.chdir(folder / "work")
    os.environ["CANARY"] = CANARY
    sys.path.insert(0, str(folder / "work"))
    code = 1
    files = (folder / "out").open("w"), (folder / "err").open("w")
    with files[0], files[1], redirect_stdout(files[0]), redirect_stderr(files[1]):
        try:
            code = command("run")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
    os._exit(code)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("template"))


def trained(folder: Path) -> Path:
    """A finished run, with one curve because pages draw for seconds."""
    run = finish(folder, "trainer.max_epochs=1", "hardware=cpu", "evaluation=none").folder
    (run / "metrics.csv").write_text("epoch,step,loss\n0,0,1.0\n")
    RunFolder(run).saved_config()  # what it composes is kept, also in forked processes
    return run


FAST = ("run resume=", "export")
"""Commands that are tried with every attack in the fast tests; those of files are tried in the report as well."""


def pairs() -> list[Any]:
    fast = {(attack, command) for attack in ATTACKS for command in FAST}
    fast |= {(attack, "report") for attack in ATTACKS if "a link" in attack or "a pipe" in attack}
    every = [(attack, command) for attack in ATTACKS for command in COMMANDS]
    return [pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow) for pair in every]


@pytest.mark.parametrize(("attack", "command"), pairs())
def test_a_strangers_folder(attack: str, command: str, template: Path, tmp_path: Path) -> None:
    outcome = tried(template, tmp_path, ATTACKS[attack], COMMANDS[command])
    assert outcome.right, outcome


@pytest.mark.parametrize("command", list(COMMANDS))
def test_an_honest_folder(command: str, template: Path, tmp_path: Path) -> None:
    outcome = tried(template, tmp_path, lambda place: None, COMMANDS[command])
    assert (outcome.code, outcome.harm) == (0, ()), outcome


if __name__ == "__main__":
    made = trained(Path(tempfile.mkdtemp()))
    print(f"{'attack':42}" + "".join(f"{name:22}" for name in COMMANDS))
    wrong = 0
    for name, attack in {"none": lambda place: None, **ATTACKS}.items():
        found = [tried(made, Path(tempfile.mkdtemp()), attack, command) for command in COMMANDS.values()]
        wrong += sum(not outcome.right for outcome in found)
        print(f"{name:42}" + "".join(f"{outcome!s:22}" for outcome in found), flush=True)
    print(f"{len(ATTACKS)} attacks, {len(COMMANDS)} commands, {wrong} wrong outcomes")
