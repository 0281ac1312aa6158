"""A new evaluation with a table and a plot is one module and one YAML file: nothing else knows its records."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.written import Page

from icl_msr.core.records import Outcome
from icl_msr.evaluate import main
from icl_msr.report.__main__ import main as report

MODULE = """
from pydantic import PositiveInt

from icl_msr.core.records import Chart, Layout, Measurement
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.suite import Results, both

GLARE = Layout(
    kind="glare",
    title="How far features move in the light, %",
    rows=("encoder",),
    columns=("lamp",),
    labels={"1": "weak", "2": "strong"},
    about="The part of the features that a lamp changes.",
    count="n",
    chart=Chart(axis="lamp", series=("encoder",), shape="lines"),
)


class Glare:
    def __init__(self, *, lamps: PositiveInt) -> None:
        self.lamps = lamps

    def names(self, dataset):
        return [f"glare/moved/{lamp}" for lamp in range(1, self.lamps + 1)]

    def __call__(self, encoder, dataset, *, device, seed, untrained_encoder=None, extractor=extract):
        results = Results()
        for name in both(encoder, untrained_encoder):
            for lamp in range(1, self.lamps + 1):
                known = {"metric": "moved", "encoder": name, "n": 8, "factors": {"lamp": lamp}}
                results.records.add(GLARE, Measurement(kind="glare", value=lamp / 8, **known))
        return results
"""
YAML = "# @package evaluation.glare\n_target_: glare_of_a_test.Glare\nlamps: 2\n"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("glare_of_a_test.py").write_text(MODULE)
    Path("conf/evaluation").mkdir(parents=True)
    Path("conf/evaluation/glare.yaml").write_text(YAML)
    for split in ("train", "test"):
        for k, name in enumerate(("$a^2_$", "_b")):  # names that mean something to whoever draws them
            Path("photos", split, name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 100, (32, 32, 3)) + 120 * k
                Image.fromarray(pixels.astype(np.uint8)).save(Path("photos", split, name, f"{i}.png"))
    data = ["dataset=imagefolder", "dataset.root=photos", "dataset.image_size=32", "hardware=cpu"]
    return ["encoder=torchvision:resnet18", "weights=null", f"hydra.searchpath=[file://{tmp_path}/conf]", *data]


def test_its_table_and_its_plot_are_everywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "evaluation=glare", "to=runs/a"]) == 0
    out = capsys.readouterr().out
    title = "How far features move in the light, %"
    assert title in out
    assert ["trained", "8", "12.5", "25.0"] in [line.split() for line in out.splitlines()]
    page = Page(Path("runs/a/report.html"))
    page.assert_self_contained()
    assert page.tables["glare"] == [["encoder", "n", "weak", "strong"], ["trained", "8", "12.5", "25.0"]]
    assert f"<h2>{title}</h2>" in page.text
    assert "The part of the features that a lamp changes." in page.text
    assert "Plot: How far features move in the light" in page.text
    assert Outcome.load(Path("runs/a")).records.numbers() == {"glare/moved/1": 0.125, "glare/moved/2": 0.25}

    assert main([*words, "evaluation=glare", "evaluation.lamps=1", "seed=1", "to=runs/b"]) == 0
    capsys.readouterr()
    assert report(["runs"]) == 0
    summary = json.loads(Path("runs/summary.json").read_text())
    names = {metric["name"] for part in summary["configurations"] for metric in part["metrics"]}
    assert names == {"glare/moved/1", "glare/moved/2"}
    assert "glare moved 1" in Path("runs/report.html").read_text()


def test_classes_are_drawn_by_their_names(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Two dollars would be mathematics, and a legend leaves names with an underscore in front out."""
    few = ["evaluation=light", "evaluation.untrained=false", "evaluation.bootstrap=20"]
    assert main([*words, *few, "to=it"]) == 0
    assert "could not be made" not in capsys.readouterr().out
    captions = json.loads(Path("it/figures/captions.json").read_text())
    assert list(captions) == ["neighbours.png", "map.png"]
