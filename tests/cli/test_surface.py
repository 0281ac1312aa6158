"""Whatever Lightning, torch and Hydra have stands in a run by its own name, from the command line."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from support.inprocess import TRAINER, WORDS, Finished, execute, finish
from support.tiny import DATA, MODEL, pieces

from icl_msr.cli.assemble import derive
from icl_msr.cli.words import overrides
from icl_msr.core.errors import UserError

LEAN = ("regularizer=none", "method=simclr", "negatives=none", "evaluation=none")
STOP = "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: online/knn, mode: max, %s}"
RATES = "+callbacks.lr={_target_: pytorch_lightning.callbacks.LearningRateMonitor}"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder) if row.get("loss")]


def saved(done: Finished) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(done.folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def test_a_fast_dev_run_ends_as_a_run_does_without_a_checkpoint(tmp_path: Path) -> None:
    done = finish(tmp_path, *LEAN, "evaluation=light", "trainer.fast_dev_run=true", "logger=tensorboard")
    assert steps(done.folder) == [0]
    assert done.json("results.json")["derived"]["total_steps"] == 1
    assert done.values[0] >= 0
    files = {path.name for path in done.folder.iterdir()}
    assert {"report.html", "encoder.safetensors"} <= files
    assert not {"checkpoints", "tensorboard"} & files


def test_early_stopping_beside_a_monitor_of_the_learning_rate(tmp_path: Path) -> None:
    """It stops where the online kNN no longer rises, and stays stopped."""
    words = (*LEAN, "trainer.max_epochs=9", RATES, STOP % "patience: 1, min_delta: 1.0")
    done = finish(tmp_path, *words)
    assert steps(done.folder) == list(range(6))
    logged = {name for row in rows(done.folder) for name, cell in row.items() if cell}
    assert {"online/knn", "lr-Adam"} <= logged
    checkpoint = saved(done)
    assert checkpoint["global_step"] == 6
    (stopping,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("EarlyStopping"))
    assert stopping["stopped_epoch"] == 1
    (done.folder / "results.json").unlink()  # as if the run had been killed as it was evaluated
    again = finish(tmp_path, *words)
    assert steps(again.folder) == list(range(6))
    assert saved(again)["global_step"] == 6
    assert again.values[0] == pytest.approx(done.values[0])


def test_several_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of ours, and one of Lightning's under a name of the user's."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = (*LEAN, "logger=[wandb,tensorboard]", "+logger.plain={_target_: pytorch_lightning.loggers.CSVLogger}")
    done = finish(tmp_path, *words, "trainer.max_epochs=1")
    assert steps(done.folder) == [0, 1, 2]
    assert list(done.folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(done.folder.glob("tensorboard/*/events.out.*"))
    with (done.folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        theirs = [row for row in csv.DictReader(file) if row["loss"]]
    assert [row["loss"] for row in theirs] == [row["loss"] for row in rows(done.folder) if row["loss"]]


def test_any_optimizer_of_torch(tmp_path: Path) -> None:
    words = (
        "optimizer._target_=torch.optim.RAdam",
        "+optimizer.betas=[0.8,0.99]",
        "+optimizer.decoupled_weight_decay=true",
    )
    done = finish(tmp_path, *LEAN, *words, "+bias_and_norm.weight_decay=0.0", "trainer.max_epochs=1")
    weights, vectors = saved(done)["optimizer_states"][0]["param_groups"]
    assert (weights["betas"], weights["decoupled_weight_decay"]) == ([0.8, 0.99], True)
    assert (weights["weight_decay"], vectors["weight_decay"]) == (1e-6, 0.0)
    state = saved(done)["optimizer_states"][0]["state"]
    assert all(float(moments["step"]) == 3 for moments in state.values())


def test_a_profiler_and_a_limit_of_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("trainer.profiler=simple", "+trainer.max_time=00:00:00:02", "trainer.max_epochs=1000")
    done = finish(tmp_path, *LEAN, *words, "~callbacks.online")
    assert 1 <= len(steps(done.folder)) < 3000
    assert saved(done)["global_step"] == len(steps(done.folder))
    assert done.json("results.json")["derived"]["total_steps"] == 3000
    assert "run_training_epoch" in caplog.text


def test_nodes_inside_of_nodes(tmp_path: Path) -> None:
    """A schedule of torch's whose factor is a function that waits for the step."""
    halves = "{_target_: operator.pow, _partial_: true, _args_: [0.5]}"
    schedule = f"+schedule={{_target_: torch.optim.lr_scheduler.LambdaLR, lr_lambda: {halves}}}"
    small = [word for word in MODEL if not word.startswith("schedule.")]
    words = (*DATA, *small, *TRAINER, *LEAN, "logger=csv", "optimizer=sgd", "~schedule", schedule)
    answer = execute(*words, "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}")
    assert answer.code == 0, answer.err
    rates = [float(row["lr"]) for row in rows(tmp_path) if row["loss"]]
    assert rates == pytest.approx([0.03, 0.015, 0.0075])


class Plan(pl.Callback):
    """Keeps what Lightning says of the length of a run, which then ends."""

    steps: float = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        raise RuntimeError("enough")


@pytest.mark.parametrize(
    "keys",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "limit_train_batches": 0.6, "accumulate_grad_batches": 3},
        {"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2},
        {"max_epochs": 3, "overfit_batches": 2},
        {"max_epochs": 3, "overfit_batches": 0.5},
        {"max_epochs": None, "max_steps": 7},
        {"max_epochs": 3, "max_steps": 7},
        {"max_epochs": 1, "max_steps": 70},
        {"max_epochs": -1, "max_steps": 70},
        {"max_epochs": 3, "fast_dev_run": 2, "max_steps": 70},
    ],
    ids=str,
)
def test_derived_steps_are_lightnings(keys: dict[str, Any]) -> None:
    words = [f"trainer.{name}={'null' if value is None else value}" for name, value in keys.items()]
    settings, module, data = pieces(*LEAN, *words)
    plan = Plan()
    given = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(RuntimeError, match="enough"):
        pl.Trainer(**given, **keys, callbacks=[plan]).fit(module, data)
    assert derive(settings, module.optimization, 64, 1)["total_steps"] == plan.steps


@pytest.mark.parametrize("epochs", ["null", "-1"])
def test_a_run_without_an_end_is_refused(epochs: str) -> None:
    settings, module, _ = pieces(*LEAN, f"trainer.max_epochs={epochs}", "trainer.max_time=00:00:00:01")
    with pytest.raises(UserError, match=rf"^trainer\.max_epochs={epochs} needs trainer\.max_steps=<number>"):
        derive(settings, module.optimization, 64, 1)


def test_steps_without_epochs(tmp_path: Path) -> None:
    """The cosine ends with the last step, in the middle of an epoch, and all is saved."""
    done = finish(tmp_path, *LEAN, "trainer.max_epochs=null", "trainer.max_steps=5", "optimizer=sgd")
    assert steps(done.folder) == list(range(5))
    assert saved(done)["global_step"] == 5
    rates = [float(row["lr"]) for row in rows(done.folder) if row["loss"]]
    assert rates == pytest.approx([0.03 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)])
    assert "epoch 2/2" in done.printed


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trainer.gradient_clip_algorithm=foo", "The trainer cannot be built: "),
        ("trainer.max_time=soon", "The trainer cannot be built: "),
        (
            "callbacks.online._target_=pytorch_lightning.Trainer",
            "callbacks.online.every_n_epochs is not a key of Trainer",
        ),
        (
            "~schedule +schedule={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau}",
            "schedule._target_=torch.optim.lr_scheduler.ReduceLROnPlateau follows a metric",
        ),
        ("optimizer.lr=-1", "The optimizer or its schedule cannot be built: Invalid learning rate: -1."),
        (
            "trainer.deterministic=maybe",
            'trainer.deterministic="maybe" is not allowed; it should be true or false or warn',
        ),
    ],
)
def test_what_torch_and_lightning_refuse_is_one_sentence(word: str, sentence: str, tmp_path: Path) -> None:
    words = [given for given in (*WORDS, *LEAN) if not (given.startswith("schedule.") and "schedule" in word)]
    answer = execute(*words, *word.split(), f"hydra.run.dir={tmp_path}/run")
    assert (answer.code, answer.out) == (2, "")
    (line,) = answer.err.splitlines()
    assert line.startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_a_key_that_was_added_since_has_its_default(tmp_path: Path) -> None:
    """By `resume=` and by the same command; what was taken away stays away."""
    words = (*LEAN, "metric=loss", "optimizer=sgd", "~callbacks.online")
    done = finish(tmp_path, *words, "trainer.max_epochs=1")
    file = done.folder / "config.yaml"
    whole = OmegaConf.load(file)
    older = whole.copy()
    del older["bias_and_norm"], older["schedule"]["scale_lr"], older["trainer"]["profiler"]
    del older["callbacks"]["checkpoints"]["every_n_minutes"], older["loader"]["num_workers"]
    for epochs, again in ((2, [f"resume={done.folder}"]), (3, None)):
        older["trainer"]["max_epochs"] = epochs - 1
        file.write_text(OmegaConf.to_yaml(older))
        more = f"trainer.max_epochs={epochs}"
        answer = (
            execute(*again, more) if again else execute(*WORDS, *TRAINER, *words, more, f"hydra.run.dir={done.folder}")
        )
        assert answer.code == 0, answer.err
        whole["trainer"]["max_epochs"] = epochs
        assert OmegaConf.load(file) == whole
        assert saved(done)["global_step"] == 3 * epochs


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("~callbacks.online -m seed=0,1", "-m ~callbacks.online seed=0,1"),
        ("seed=1 --cfg job ~callbacks.online", "--cfg job seed=1 ~callbacks.online"),
        ("trainer.profiler=simple +trainer.max_steps=3", "trainer.profiler=simple ++trainer.max_steps=3"),
        ("trainer.devices=2 ++trainer.x=1 +seed=1", "++trainer.devices=2 ++trainer.x=1 +seed=1"),
    ],
)
def test_words_as_hydra_reads_them(typed: str, words: str) -> None:
    assert overrides(typed.split()) == words.split()
