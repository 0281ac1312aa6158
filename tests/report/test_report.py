"""Reports from run folders written here: what a page says is what the files say."""

import base64
import csv
import json
import math
import os
import re
import shutil
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.written import SPLITS, Page, accuracy, gap, outcome, save, top1, write_box_run, write_run

from icl_msr.core.errors import UserError
from icl_msr.core.folder import FORMAT
from icl_msr.core.records import Measurement, Outcome, Records
from icl_msr.evaluation.strata_maps import STRATA
from icl_msr.report import summarise, words, write_report, write_summary
from icl_msr.report.__main__ import main
from icl_msr.report.output import as_markdown
from icl_msr.report.page import _curve_plots, _mean_curve, _races
from icl_msr.report.runs import GAIN, Curve, Run
from icl_msr.report.summary import best, comparison, heading, headline
from icl_msr.report.summary_tables import told


def test_page_is_self_contained_and_its_numbers_are_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    file = write_report(run)
    assert file == run / "report.html"
    page = Page(file)
    page.assert_self_contained()
    pictures = [source for source in page.sources if source.startswith("data:image/png")]
    assert [base64.b64decode(p.split(",")[1]) for p in pictures] == [
        (run / "figures" / name).read_bytes() for name in ("strata.png", "views.png")
    ]
    assert "Strata &lt;a&gt; &amp; b" in page.text

    records = Outcome.load(run).records
    rows = {tuple(row[:3]): dict(zip(SPLITS, row[3:], strict=True)) for row in page.tables["accuracy"][1:]}
    assert len(rows) == 8
    for a in records.where("accuracy"):
        assert a.value is not None
        interval = f"{100 * a.low:.1f} to {100 * a.high:.1f}"  # type: ignore[operator]
        assert rows[a.fitted_on, str(a.classifier), a.encoder][a.split] == f"{100 * a.value:.1f} {interval}"
    shown = [cell.split(" ")[0].replace("−", "-") for row in page.tables["gap"][1:] for cell in row[2:]]
    assert sorted(shown) == sorted(f"{record.value:+.1f}" for record in records.where("gap"))


def test_answer_names_the_loss_its_interval_and_the_untrained_encoder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    results = Outcome.load(run)
    known = {"split": "mixed_same", "minus": "mixed_rand", "classifier": "linear", "fitted_on": "train"}
    lost, untrained = (results.records.find("gap", encoder=e, **known) for e in ("trained", "untrained"))
    assert lost
    assert untrained
    said = " ".join(words.answer(results))
    assert f"loses {lost.value:.1f} points (95 % interval {lost.low:.1f} to {lost.high:.1f})" in said
    assert f"On the untrained encoder it loses {untrained.value:.1f} points" in said
    known = {"split": "mixed_rand", "classifier": "linear", "fitted_on": "balanced", "encoder": "trained"}
    balanced = results.records.find("accuracy", **known)
    assert balanced
    assert balanced.value
    assert f"right on {100 * balanced.value:.1f} %" in said
    every = results.records.measurements
    every[every.index(lost)] = replace(lost, value=-1.0, low=-3.0, high=1.5)
    said = words.answer(results)[0]
    assert "gains 1.0 points (95 % interval −1.5 to 3.0)" in said
    assert "not distinguishable" in said


def test_what_is_said_of_shape_and_texture() -> None:
    right = accuracy("conflict_shape", 0.325)
    bias = partial(Measurement, kind="shape", classifier=right.classifier, fitted_on="train", n=80)
    biased = [bias(metric="shape_bias", value=0.65, low=0.5, high=0.8), bias(metric="decided", value=40, unit="count")]
    read = partial(Measurement, kind="decodability", n=80)
    cues = [read(value=value, factors={"cue": cue}) for cue, value in (("shape", 0.75), ("texture", 0.25))]
    found = outcome(right, *biased, *cues, read(metric="chance", value=0.5))
    assert words.answer(found) == [
        "Where shape and texture contradict each other, a linear classifier on the encoder goes by the shape in 65.0 % "
        "(95 % interval 50.0 to 80.0) of the 40 images that it names by either.",
        "Fitted to other stimuli, probes read the shape of 75.0 % and the texture of 25.0 %; chance is 50.0 %.",
    ]
    found.records.measurements.insert(0, replace(right, split="test"))
    assert "were not told apart" in words.answer(found)[0]
    assert "goes by the shape" in " ".join(words.answer(found))


def further() -> list[Measurement]:
    """Measurements of the worst group, of reliance, of attention, and of shape and texture."""
    bounds = {"low": 0.1, "high": 0.3, "n": 100}
    known: dict[str, Any] = {
        "classifier": accuracy("", 0).classifier,
        "fitted_on": "train",
        "split": "original",
        **bounds,
    }
    cues = (("colour", 0.97), ("global shape", 0.28), ("texture", 0.63))
    return [
        Measurement(kind="groups", metric="worst", value=0.16, note="arrow, other background (905 images)", **known),
        Measurement(kind="groups", metric="average", value=0.45, **known),
        Measurement(kind="groups", metric="worst", value=0.21, **known | {"fitted_on": "balanced groups"}),
        *(
            Measurement(kind="reliance", metric="relative", value=value, factors={"cue": cue}, **known)
            for cue, value in cues
        ),
        *(
            Measurement(
                kind="attention", metric=metric, value=v, encoder=e, split="original", factors={"map": m}, **bounds
            )
            for m in ("Eigen-CAM", "Grad-CAM")
            for e, metric, v in (
                ("trained", "share", 0.2),
                ("trained", "share_elsewhere", 0.17),
                ("untrained", "share", 0.15),
            )
        ),
        Measurement(kind="shape", metric="shape_bias", value=0.65, **known),
    ]


def test_the_first_paragraph_says_what_was_measured() -> None:
    found = outcome(accuracy("original", 0.8), *further())
    said = words.answer(found)
    assert said[0] == (
        "A linear probe on the frozen encoder is right on 16.0 % (95 % interval 10.0 to 30.0) of its worst group, "
        "arrow, other background (905 images), against 45.0 % on average; fitted on as many images of each group, on "
        "21.0 %."
    )
    assert (
        "Of its Grad-CAM maps, 20.0 % (95 % interval 10.0 to 30.0) is on the object; it would be 17.0 % if they did "
        "not see it, and is 15.0 % for the untrained encoder."
    ) in said
    assert (
        "Without global shape, 28.0 % of the clean accuracy is left, without texture 63.0 %, without colour 97.0 %."
        in said
    )
    assert not any("were not told apart" in sentence for sentence in said)
    alone = outcome(*(record for record in further() if record.kind == "attention"))
    assert words.answer(alone)[0].startswith("Of its Grad-CAM maps")


def test_the_answer_and_the_headline_stay_on_one_screen(tmp_path: Path) -> None:
    for name in ("none", "msr"):
        run = write_run(tmp_path / name, "moco", name)
        results = Outcome.load(run)
        results.records.measurements += [replace(r, value=(r.value or 0) + 0.1 * (name == "msr")) for r in further()]
        save(run, results)
    said = words.answer(results)
    assert "when the background is swapped" in said[0]
    assert len(" ".join(said)) < 80 * 20
    page = Page(write_report(run))
    assert "right on the worst group" in page.text
    rows = summarise([tmp_path]).configurations
    columns = headline(rows)
    assert len(columns) == 8
    heads = [heading(record) for record in columns]
    assert heads[0] == ("original", "linear")
    assert heads[-4:] == [
        ("worst group", "linear"),
        ("worst group", "linear, balanced groups"),
        ("shape bias", "linear"),
        ("on the object", "Grad-CAM"),
    ]
    assert "On its worst group, msr is right most often, 26.0 %, and none least often, 16.0 %." in comparison(rows)
    write_summary(summarise([tmp_path]), tmp_path / "out")
    assert "worst group" in (tmp_path / "out" / "summary.md").read_text()


def test_the_answer_is_of_the_classifier_whose_gap_was_measured() -> None:
    found = outcome(
        accuracy("only_texture", 0.2),
        accuracy("original", 0.8, "knn"),
        accuracy("mixed_rand", 0.5, "knn"),
        gap("original", "mixed_rand", 30.0, "knn"),
    )
    assert words.main_classifier(found.records) == gap("original", "mixed_rand", 30.0, "knn").classifier
    assert "loses 30.0 points" in words.answer(found)[0]


def test_a_part_of_the_labels_is_said_and_texture_has_no_winner(tmp_path: Path) -> None:
    said = words.answer(outcome(accuracy("test", 0.5, "linear-10%")))
    assert "A linear probe on the frozen encoder with 10 % of the labels reaches 50.0 % on test." in said
    for name in ("none", "msr"):
        write_run(tmp_path / name, "moco", name)
    rows = summarise([tmp_path]).configurations
    assert best(accuracy("mixed_rand", 0.0).identity, rows) is not None
    assert best(accuracy("only_bg", 0.0).identity, rows) is None
    assert best(gap("mixed_same", "mixed_rand", 0.0).identity, rows) is not None
    assert best(gap("mixed_same", "mixed_rand", 0.0, encoder=GAIN).identity, rows) is None


def test_page_without_optional_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"seed": 0}')
    page = Page(write_report(run))
    page.assert_self_contained()
    assert "not evaluated" in page.text

    save(run, outcome(accuracy("test", 0.5)))
    (run / "metrics.csv").write_text("epoch,step,loss,msr/meta_grad_norm\n0,0,nan,0.0\n0,1,,\n")
    page = Page(write_report(run))
    assert "50.0 % on test" in page.text
    assert "were not told apart" in page.text
    assert summarise([run]).configurations[0].metrics[accuracy("test", 0.5).identity].mean == 50


def test_one_row_a_configuration_with_mean_and_std_over_seeds(tmp_path: Path) -> None:
    for method in ("moco", "byol"):
        for regularizer in ("none", "msr"):
            for seed in range(3):
                write_run(tmp_path / "deep" / f"{method}-{regularizer}-{seed}", method, regularizer, seed)
    summary = summarise([tmp_path, tmp_path / "deep"])
    assert [c.labels for c in summary.configurations] == [
        {"method": method, "regularizer": regularizer} for method in ("byol", "moco") for regularizer in ("none", "msr")
    ]
    metric = accuracy("mixed_rand", 0.0).identity
    expected = [100 * top1("byol", "none", seed, "trained", "linear", "train", "mixed_rand") for seed in range(3)]
    statistic = summary.configurations[0].metrics[metric]
    assert statistic.values == pytest.approx(tuple(expected))
    assert statistic.mean == pytest.approx(sum(expected) / 3)
    assert statistic.std == pytest.approx(np.std(expected, ddof=1))
    gain = summary.configurations[0].metrics[replace(metric, encoder=GAIN)]
    reference = [100 * top1("byol", "none", seed, "untrained", "linear", "train", "mixed_rand") for seed in range(3)]
    assert gain.std == pytest.approx(statistics.stdev(a - b for a, b in zip(expected, reference, strict=True)))

    files = write_summary(summary, tmp_path)
    assert [file.name for file in files] == ["summary.csv", "summary.md", "summary.json", "report.html", "summary.tex"]
    with files[0].open() as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == 4
    assert table[0]["seeds"] == "0 1 2"
    assert told(metric) == "linear/train/mixed_rand"
    assert float(table[0][told(metric)]) == pytest.approx(statistic.mean)
    assert float(table[0][f"{told(metric)} std"]) == pytest.approx(statistic.std)
    everything = json.loads(files[2].read_text())
    assert [c["seeds"] for c in everything["configurations"]] == [[0, 1, 2]] * 4
    page = Page(files[3])
    page.assert_self_contained()
    assert page.links == []
    pages = [write_report(run.path) for configuration in summary.configurations for run in configuration.runs]
    linked = [f"{part}/report.html" for part in (file.parent.relative_to(tmp_path) for file in pages)]
    assert Page(write_summary(summary, tmp_path)[3]).links == linked
    assert [row[:3] for row in page.tables["headline"][1:]][1] == ["byol", "msr", "3"]
    for row, c in zip(page.tables["headline"][1:], summary.configurations, strict=True):
        for cell, column in zip(row[3:], headline(summary.configurations), strict=True):
            assert cell.lstrip("+") == str(c.metrics[column])


def test_curves_of_the_configurations_are_drawn_together(tmp_path: Path) -> None:
    for method, seed, rows in (("moco", 0, 3), ("moco", 1, 2), ("byol", 0, 3)):
        run = write_run(tmp_path / f"{method}-{seed}", method, seed=seed)
        lines = [f"{i},{10 * i},{(0.1 * i + 0.02 * seed):.3f}" for i in range(1, rows + 1)]
        (run / "metrics.csv").write_text("\n".join(["epoch,step,online/knn", *lines]) + "\n")
    byol, moco = summarise([tmp_path]).configurations
    curve = _mean_curve(moco, "online/knn")
    assert curve is not None
    assert curve.steps == [10, 20]
    assert curve.values == pytest.approx([11, 21])
    assert _mean_curve(byol, "loss") is None
    (plot,) = _races([byol, moco])
    svg = base64.b64decode(plot.light.partition(",")[2]).decode()
    assert svg.index(">byol<") < svg.index(">moco<")  # 30 % against 21 %
    assert _races([byol]) == []


def test_only_what_differs_is_a_column(tmp_path: Path) -> None:
    write_run(tmp_path / "a", regularizer="none", optimizer__lr=0.01)
    write_run(tmp_path / "b", regularizer="none", optimizer__lr=0.002)
    labels = [c.labels for c in summarise([tmp_path]).configurations]
    assert labels == [{"optimizer.lr": "0.002"}, {"optimizer.lr": "0.01"}]
    write_run(tmp_path / "c", regularizer="msr", regularizer__weight=0.5, optimizer__lr=0.01)
    labels = [c.labels for c in summarise([tmp_path]).configurations]
    assert [tuple(label) for label in labels] == [("regularizer", "optimizer.lr")] * 3
    single = summarise([tmp_path / "a"]).configurations[0]
    assert single.labels == {"run": "moco-none-none-confounded"}


def test_keys_that_nobody_typed_tell_runs_apart_only_where_nothing_else_does(tmp_path: Path) -> None:
    for method, gray in (("moco", 0.1), ("cmc", 0.0)):
        write_run(tmp_path / method, method, "none", 0, augment__gray=gray)
    assert [c.labels for c in summarise([tmp_path]).configurations] == [{"method": "cmc"}, {"method": "moco"}]
    write_run(tmp_path / "again", "moco", "none", 0, augment__gray=0.2)
    labels = [tuple(c.labels.items()) for c in summarise([tmp_path]).configurations]
    assert (("method", "moco"), ("augment.gray", "0.2")) in labels
    file = tmp_path / "cmc" / "environment.json"
    file.write_text(json.dumps({"format": FORMAT, "command": "python -m icl_msr.run method=cmc +augment.gray=0.0"}))
    shutil.rmtree(tmp_path / "again")
    labels = [tuple(c.labels) for c in summarise([tmp_path]).configurations]
    assert labels == [("method", "augment.gray")] * 2


def test_same_configuration_and_seed_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "old")
    write_run(tmp_path / "new")
    os.utime(tmp_path / "old/results.json", (0, 0))
    summary = summarise([tmp_path])
    assert [run.path for run in summary.configurations[0].runs] == [tmp_path / "new"]
    assert summary.superseded == [tmp_path / "old"]


def test_full_and_fg_runs_join_into_the_two_by_two(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_box_run(tmp_path / f"full{seed}", "full", 0.40 + 0.02 * seed, 0.36, seed)
        write_box_run(tmp_path / f"fg{seed}", "fg", 0.25, 0.50 + 0.04 * seed, seed)
    summary = summarise([tmp_path])
    (joined,) = summary.two_by_two
    assert str(joined.classifier) == "linear"
    means = {condition: cell.mean for condition, cell in joined.cells.items()}
    assert means == pytest.approx({("full", "full"): 41, ("full", "fg"): 36, ("fg", "full"): 25, ("fg", "fg"): 52})
    assert joined.cells["fg", "fg"].std == pytest.approx(math.sqrt(8))
    page = Page(write_summary(summary, tmp_path)[3])
    assert page.tables["two-by-two"][1][-4:] == ["41.0 ± 1.4", "36.0 ± 0.0", "52.0 ± 2.8", "25.0 ± 0.0"]
    assert "| 41.0 ± 1.4 | 36.0 ± 0.0 | 52.0 ± 2.8 | 25.0 ± 0.0 |" in as_markdown(summary)
    write_box_run(tmp_path / "alone/full", "full", 0.4, 0.3)
    assert summarise([tmp_path / "alone"]).two_by_two == []


def test_failed_runs_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    copy = tmp_path / "good/wandb/files"
    copy.mkdir(parents=True)
    (copy / "config.yaml").write_text("seed: 0")
    for name in ("died", ".hydra"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("seed: 1")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/results.json").write_text('{"seed": 0, "acc')
    summary = summarise([tmp_path])
    assert len(summary.configurations) == 1
    assert sorted(failed.path.name for failed in summary.failed) == ["died", "torn"]
    page = Page(write_summary(summary, tmp_path)[3])
    assert str(tmp_path / "died") in page.text
    assert "torn" in as_markdown(summary)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "There is no folder" in error
    assert "Traceback" not in error
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "There is no run in" in capsys.readouterr().err
    run = write_run(tmp_path / "runs/0", regularizer="none")
    assert main([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert main([str(run), "--wandb", "project"]) == 2
    assert "logger=wandb" in capsys.readouterr().err
    other = write_run(tmp_path / "runs/1", seed=1)
    assert main([str(run), str(other)]) == 0
    assert (tmp_path / "runs/summary.csv").exists()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:12])) <= 120
    assert "BG-gap" in out
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "elsewhere")]) == 0
    assert 'href="../runs/0/report.html"' in (tmp_path / "elsewhere/report.html").read_text()


def test_unreadable_results_are_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"seed": "zero"}')
    with pytest.raises(UserError, match="seed"):
        write_report(tmp_path)


LAYOUT = replace(STRATA, about="1,000 images of original", labels={"1": "stratum 1"})
NAMED = {"all channels": 13.33, 1: 20.51, 2: 10.42, 3: 13.17}


def strata(excess: dict[int | str, tuple[float, float]] | None = None, low: float = 9.5, high: float = 10.7) -> Records:
    """Shares and excesses by stratum, and the difference of the first two, with its interval."""
    records = Records(layouts={"strata": LAYOUT})
    records.measurements.append(Measurement(kind="strata_area", metric="area", value=0.132))
    for name, share in NAMED.items():
        record = partial(Measurement, kind="strata", factors={"stratum": name})
        value, place = share / 100, 0.1304
        least, most = (excess or {}).get(name, (share - 13.24, share - 12.84))
        records.add(
            LAYOUT,
            record(metric="share", value=value, low=value - 0.004, high=value + 0.004),
            record(metric="by_place", value=place),
            record(metric="excess", value=share - 13.04, low=least, high=most, unit="points"),
        )
    apart = partial(Measurement, kind="strata_apart")
    records.measurements.append(apart(metric="difference", value=10.11, low=low, high=high, unit="points"))
    records.measurements += [apart(metric="more", value=1, unit="count"), apart(metric="less", value=2, unit="count")]
    return records


def test_page_says_where_the_strata_look(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    results = Outcome.load(run)
    results.records.join(strata())
    save(run, results)
    page = Page(write_report(run))
    page.assert_self_contained()
    assert page.tables["strata"][1:] == [
        ["all channels", "13.3 12.9 to 13.7", "13.0", "+0.3 0.1 to 0.5"],
        ["stratum 1", "20.5 20.1 to 20.9", "13.0", "+7.5 7.3 to 7.7"],
        ["2", "10.4 10.0 to 10.8", "13.0", "−2.6 −2.8 to −2.4"],
        ["3", "13.2 12.8 to 13.6", "13.0", "+0.1 −0.1 to 0.3"],
    ]
    assert (
        "Stratum 2 has clearly less activation on the object than a map that does not see it: stratum 2 has 10.4 % "
        "instead of 13.0 %; stratum 1 has clearly more. They differ: stratum 1 has more of it on the object than "
        "stratum 2: +10.1 points (95 % interval 9.5 to 10.7)." in page.text
    )
    assert "1,000 images of original" in page.text
    assert "Plot: Where the strata look" in page.text
    assert "strata" not in Page(write_report(write_run(tmp_path / "without"))).tables


def test_strata_that_look_at_the_same_place_are_said_to() -> None:
    near = dict.fromkeys(NAMED, (-1.2, 1.2))  # a tenth of the area is 1.3 points
    for low, high in ((-1.0, 3.0), (0.1, 0.4)):  # not distinguishable, or too little to matter
        none, same = words.strata(strata(near, low, high))
        assert none.startswith("No stratum avoids the object: none has clearly less")
        assert none.endswith(", and none has clearly more.")
        assert same.startswith("All strata look at about the same place")
    assert words.strata(strata(dict.fromkeys(NAMED, (1.4, 2.0))))[0].endswith("; strata 1, 2 and 3 have clearly more.")
    less = words.strata(strata(dict.fromkeys(NAMED, (-2.0, -1.4))))[0]
    assert less.startswith("Strata 1, 2 and 3 have clearly less activation on the object")
    assert words.strata(Records()) == []


def norms(meta: list[float], uniformity: list[float]) -> dict[str, Curve]:
    steps = [float(step) for step in range(len(meta))]
    return {
        "msr/meta_grad_norm": Curve(steps, meta),
        "msr/uniformity_grad_norm": Curve(steps, uniformity),
    }


def test_a_faint_meta_signal_is_said_and_a_live_one_is_not() -> None:
    faint = norms([0.004, 0.002, 0.5], [1.0, 1.0, 1.0])  # the median counts
    relative = {"weights": "meta", "alpha": "relative", "relative_step": 0.01}
    said = words.faint_meta_signal(faint, relative)
    assert said == (
        "The meta gradient was 0.4 % of the uniformity gradient (median of 3 logged steps), so f_msr learnt from "
        "uniformity alone; type a larger regularizer.relative_step (it was 0.01; try 0.1) or a smaller "
        "regularizer.gamma."
    )
    assert "type regularizer.alpha=relative." in words.faint_meta_signal(faint, {"weights": "meta", "alpha": "lr"})
    assert "regularizer.lam" in words.faint_meta_signal(faint, {**relative, "weights": "joint"})
    assert words.faint_meta_signal(norms([0.02, 0.0, 0.02], [1.0, 1.0, 1.0]), relative) == ""
    assert words.faint_meta_signal(norms([0.02, 0.0], [0.0, 0.0]), relative) == ""  # gamma = 0
    assert words.faint_meta_signal({}, relative) == ""  # no regularizer, or one without a meta step
    # A row may have one of the two alone.
    some = faint | {"msr/uniformity_grad_norm": Curve([1.0], [0.1])}
    assert "was 2 %" not in words.faint_meta_signal(some, relative)
    assert words.faint_meta_signal(some, relative) == ""


def test_the_warning_is_on_the_page_of_a_run_that_needs_it(tmp_path: Path) -> None:
    """The written run's meta gradient falls from 1/300 of uniformity's."""
    run = write_run(tmp_path / "run")
    page = Page(write_report(run))
    assert "of the uniformity gradient (median of" in page.text
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    for row in rows:
        row["msr/meta_grad_norm"] = row["msr/uniformity_grad_norm"]
    with (run / "metrics.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert "of the uniformity gradient (median of" not in Page(write_report(run)).text


def test_similarities_have_a_plot(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    names = ("own", "positive", "others", "hardest")
    rows = [{"step": step, **{f"negatives/similarity_{name}": 0.1 for name in names}} for step in range(3)]
    with (run / "metrics.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (plot,) = _curve_plots(Run.load(run).curves)
    assert plot.title == "Similarity of an image to its non-semantic negatives"
    assert set(names) <= set(re.findall(r">(\w+)</text>", base64.b64decode(plot.light.split(",")[1]).decode()))


def test_any_number_that_is_logged_has_a_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.csv").write_text("step,loss,mine/first,mine/second\n0,1,2,3\n1,1,2,3\n2,1,2,3\n")
    assert [plot.title for plot in _curve_plots(Run.load(run).curves)] == ["Loss and its parts", "Other numbers: mine"]


def test_the_strata_have_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    logged = {"entropy": 0.97, "overlap": 0.9, "variation": 0.01, "loss_1": 4.0, "loss_2": 4.1}
    rows = [{"step": step, "loss": 1.0, **{f"msr/{name}": v for name, v in logged.items()}} for step in range(3)]
    with (run / "metrics.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plots = {
        plot.title: base64.b64decode(plot.light.split(",")[1]).decode() for plot in _curve_plots(Run.load(run).curves)
    }
    assert {"entropy", "overlap", "variation"} <= set(re.findall(r">(\w+)</text>", plots["The strata"]))
    assert {"a_1", "a_2"} <= set(re.findall(r">(\w+)</text>", plots["L_msr with one stratum alone"]))


def test_what_is_lost_elsewhere_is_said() -> None:
    both = [accuracy("test", 0.5), accuracy("sketch", 0.2)]
    results = outcome(*both, gap("test", "sketch", 30.0, low=25.0, high=35.0))
    _, reached, lost = words.answer(results)
    assert reached == "A linear probe on the frozen encoder reaches 50.0 % on test."
    assert lost == "It loses 30.0 points (95 % interval 25.0 to 35.0) on sketch."
    assert words.answer(outcome(*both))[1].endswith("reaches 50.0 % on test, 20.0 % on sketch.")


def test_fine_tuning_alone_is_said_and_compared(tmp_path: Path) -> None:
    rows = [accuracy("test", 0.5, name) for name in ("finetune-1%", "finetune-10%")]
    said = words.answer(outcome(*rows))[1]
    assert said == "The fine-tuned encoder with 1 % of the labels reaches 50.0 % on test."
    rows += [accuracy("test", 0.4, name) for name in ("linear-10%", "knn-dino", "knn-wmse")]
    assert words.answer(outcome(*rows))[1].startswith(
        "A linear probe on the frozen encoder with 10 % of the labels reaches 40"
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, outcome(*rows, name=name, choices={"method": name, "dataset": "photos"}))
    assert main([str(tmp_path)]) == 0
    text = Page(tmp_path / "report.html").text
    assert all(name in text for name in ("finetune-1%", "finetune-10%", "linear-10%", "knn-dino"))
    assert r"finetune-10\%" in (tmp_path / "summary.tex").read_text()


def test_no_spreadsheet_runs_a_summary(tmp_path: Path) -> None:
    for name in ("=1+1", "@sum", "+a", "-b"):
        (tmp_path / name).mkdir()
        choices = {"method": name, "=key": name, "dataset": "photos"}
        save(tmp_path / name, outcome(accuracy(f"{name} split", 0.5), name=name, choices=choices))
    assert main([str(tmp_path)]) == 0
    cells = [cell for row in csv.reader((tmp_path / "summary.csv").open()) for cell in row]
    assert {"'=1+1", "'@sum", "'+a", "'-b", "'=key"} <= set(cells)
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")]


def test_only_pictures_that_lie_in_figures_are_on_a_page(tmp_path: Path) -> None:
    """Captions name files, and a folder may come from somebody else."""
    run = write_run(tmp_path / "run")
    png = (run / "figures/views.png").read_bytes()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "other.png").write_bytes(png)
    (run / "figures/link.png").symlink_to(run / "figures/views.png")
    (run / "figures/text.png").write_bytes(b"secret")
    (run / "figures/folder.png").mkdir()
    names = [str(tmp_path / "secret"), "../../other.png", "link.png", "text.png", "folder.png", "gone.png", "views.png"]
    (run / "figures/captions.json").write_text(json.dumps(dict.fromkeys(names, "A picture.")))
    assert [picture.file.name for picture in Run.load(run).pictures] == ["views.png", "strata.png"]
    sources = [source for source in Page(write_report(run)).sources if source.startswith("data:image/png")]
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == [png, png]
    (run / "figures/captions.json").unlink()
    assert [picture.file.name for picture in Run.load(run).pictures] == ["strata.png", "views.png"]
    (run / "figures/out.png").symlink_to(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"figures/out\.png leads out of the run's folder"):
        write_report(run)
