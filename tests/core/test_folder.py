"""What a run folder says of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.tiny import composed

from icl_msr.core.errors import UserError
from icl_msr.core.folder import FORMAT, RunFolder
from icl_msr.report.runs import Run

CHOICES = {"method": "moco", "evaluation": "light+corruptions", "logger": "csv", "callbacks": "default"}
WORDS = ("method=moco", "evaluation=[light,corruptions]", "logger=csv")


def begun(folder: Path, choices: dict[str, str] = CHOICES, **facts: Any) -> tuple[RunFolder, Any]:
    """A folder in which a run was begun, and its config."""
    run, config = RunFolder(folder), composed(*WORDS)
    OmegaConf.save(config, run.config)
    run.write_facts({"choices": choices, "icl_msr": "0.2.0", **facts})
    return run, OmegaConf.to_container(config)


def test_keys_that_were_added_since_have_todays_value(tmp_path: Path) -> None:
    run, config = begun(tmp_path)
    assert run.saved_config(resolve=False) == config
    saved = composed(*WORDS, "method.temperature=0.3", "evaluation.corruptions.images=5")
    OmegaConf.set_struct(saved, False)
    for key in ("method.momentum", "evaluation.corruptions.split", "loader.num_workers", "metric"):
        node, _, name = key.rpartition(".")
        del (OmegaConf.select(saved, node) if node else saved)[name]
    OmegaConf.save(saved, run.config)
    found = run.saved_config(resolve=False)
    config["method"]["temperature"] = 0.3
    config["evaluation"]["corruptions"]["images"] = 5
    assert found == config


def test_what_was_taken_away_does_not_come_back(tmp_path: Path) -> None:
    """A callback that the run had not, and a group that it must have had."""
    run, config = begun(tmp_path)
    del config["callbacks"]["online"], config["method"]
    OmegaConf.save(OmegaConf.create(config), run.config)
    found = run.saved_config(resolve=False)
    assert "online" not in found["callbacks"]
    assert "method" not in found


def test_choices_of_another_package_stay_as_they_were_saved(tmp_path: Path) -> None:
    run, config = begun(tmp_path, {**CHOICES, "method": "mine"})
    config["method"] = {"_target_": "mypkg.Mine", "width": 8}
    del config["evaluation"]["light"]["bootstrap"]
    OmegaConf.save(OmegaConf.create(config), run.config)
    found = run.saved_config(resolve=False)
    assert found["method"] == {"_target_": "mypkg.Mine", "width": 8}
    assert found["evaluation"]["light"]["bootstrap"] == 1000


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"format": FORMAT + 1, "icl_msr": "9.1"}, f"has format {FORMAT + 1}, and this version reads format {FORMAT}"),
        ({"icl_msr": "0.1.0"}, r"does not say its format, .*; use icl-msr 0\.1\.0, which wrote it, or repeat the run"),
        ({}, "does not say its format, .*; use the version of icl-msr that wrote it"),
        ([], r"environment\.json is damaged \(it does not hold a mapping\); restore it from a copy"),
        ({"choices": ["moco"]}, r"environment\.json is damaged \(choices should be dict"),
        (None, "does not say its format"),
    ],
)
def test_another_format_is_refused(facts: Any, sentence: str, tmp_path: Path) -> None:
    run, _ = begun(tmp_path)
    run.require_format()
    if facts is None:
        run.environment.unlink()
    else:
        run.environment.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=sentence):
        run.saved_config()


def test_a_report_refuses_another_format(tmp_path: Path) -> None:
    run, _ = begun(tmp_path)
    run.results.write_text('{"seed": 0}')
    run.environment.write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}"):
        Run.load(tmp_path)
