"""A run goes on where its images and its devices have moved, and nowhere else."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.inprocess import Answer, execute
from support.tiny import MODEL

WORDS = [*MODEL, "dataset=imagefolder", "dataset.root=photos", "dataset.image_size=32", "loader.batch_size=4"]
WORDS += ["loader.num_workers=0", "evaluation=none", "logger=csv", "~callbacks.online", "hardware=cpu"]


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run of one epoch on the folder `photos`, which has moved to `moved` since."""
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        file = Path("photos", "train" if number % 3 else "val", "ab"[number % 2], f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), number + 1).convert("RGB").save(file)
    first = execute(*WORDS, "trainer.max_epochs=1", "hydra.run.dir=run")
    assert first.code == 0, first.err
    shutil.move("photos", "moved")


def goes_on(*words: str) -> Answer:
    return execute("resume=run", "trainer.max_epochs=2", *words)


@pytest.mark.usefixtures("begun")
def test_images_that_moved() -> None:
    code, _, err = goes_on()
    assert (code, err.count("\n"), "photos" in err) == (2, 1, True)
    code, _, err = goes_on("dataset.root=moved,moved")
    assert (code, "give one value" in err) == (2, True)
    answer = goes_on("dataset.root=moved")
    assert answer.code == 0, answer.err
    assert "Continuing" in answer.out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["dataset"]["root"] == "moved"


@pytest.mark.usefixtures("begun")
def test_other_images_are_refused() -> None:
    next(Path("moved/train/a").iterdir()).unlink()
    code, _, err = goes_on("dataset.root=moved")
    assert (code, err.count("\n")) == (2, 1)
    assert "The data of" in err
    code, _, err = execute("resume=run", "dataset.root=moved")  # a finished run would compare nothing
    assert (code, err.count("\n")) == (2, 1)
    assert "dataset.root=photos, and moved was asked for" in err
