"""What a user types, made into Hydra's overrides."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from icl_msr.cli.words import for_sweep, in_short, overrides, path_in, spelled_out
from icl_msr.core.errors import UserError

BOTH = "evaluation=[light,corruptions]"
SPELLED_OUT = [
    # what was typed, and what its last word becomes
    ("evaluation.bootstrap=7", ["evaluation.default.bootstrap=7"]),
    (f"{BOTH} evaluation.bootstrap=7", ["evaluation.light.bootstrap=7", "evaluation.corruptions.bootstrap=7"]),
    (f"{BOTH} evaluation.images=5", ["evaluation.corruptions.images=5"]),
    (f"{BOTH} evaluation.corruptions=[fog]", ["evaluation.corruptions.corruptions=[fog]"]),
    (f"{BOTH} evaluation.corruptions.images=5", ["evaluation.corruptions.images=5"]),
    (f"{BOTH} ~evaluation.corruptions", ["~evaluation.corruptions"]),
    (f"{BOTH} evaluation.nothing=5", ["evaluation.corruptions.nothing=5"]),  # where it is refused
    ("evaluation=shape evaluation.stimuli=a", ["evaluation.shape.stimuli=a"]),  # a key that has no value yet
    ("evaluation=shape +evaluation.same.car=[truck]", ["+evaluation.shape.same.car=[truck]"]),
    ("evaluation=robustness evaluation.severities=[1]", ["evaluation.robustness.severities=[1]"]),
    ("evaluation=none +evaluation.mine={_target_:a.b}", ["+evaluation.mine={_target_:a.b}"]),
    ("logger=[wandb,tensorboard] logger.mode=offline", ["logger.wandb.mode=offline"]),
    ("+callbacks.mine._target_=a.b callbacks.mine.x=1", ["callbacks.mine.x=1"]),
    ("method.temperature=0.1", ["method.temperature=0.1"]),
    ("hydra.run.dir=a", ["hydra.run.dir=a"]),
]


@pytest.mark.parametrize(("line", "last"), SPELLED_OUT, ids=lambda case: case if isinstance(case, str) else "")
def test_a_key_goes_to_the_choices_that_have_it(line: str, last: list[str]) -> None:
    words = line.split()
    assert spelled_out(words) == [*words[:-1], *last]
    assert spelled_out(spelled_out(words)) == spelled_out(words)  # as ranks do


REFUSED = [
    ("evaluation=none evaluation.knn=[dino]", "evaluation is none and has no keys, so evaluation.knn"),
    ("augment=[small,colour]", "augment takes one; write augment=<name>, or -m augment=small,colour for a run with"),
]


@pytest.mark.parametrize(("line", "sentence"), REFUSED)
def test_what_no_choice_could_have_is_refused(line: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        spelled_out(line.split())
    assert sentence in str(error.value)


def test_a_word_is_recognised_by_what_was_typed() -> None:
    assert in_short("evaluation.corruptions.images=5") == "evaluation.images=5"
    assert in_short("+evaluation.shape.same.car=[truck]") == "+evaluation.same.car=[truck]"
    assert in_short("++evaluation.images=5") == in_short("++evaluation.corruptions.images=5") == "evaluation.images=5"
    assert in_short("seed=0.1.2") == "seed=0.1.2"


def test_the_jobs_of_a_sweep_have_the_keys_of_their_own_choices() -> None:
    words = for_sweep(["evaluation.images=5", "+evaluation.same.car=[truck]", "~callbacks.online", "seed=0"])
    assert words == ["++evaluation.images=5", "+evaluation.same.car=[truck]", "~callbacks.online", "seed=0"]
    assert spelled_out(["evaluation=corruptions", words[0]])[1:] == ["++evaluation.corruptions.images=5"]
    assert spelled_out(["evaluation=light", words[0]])[1:] == ["evaluation.light.images=5"]  # where it is refused


def test_short_forms_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert overrides(["seed=1", "-m", "backbone=timm:vit.a"]) == [
        "-m",
        "seed=1",
        "backbone=timm",
        "backbone.name=vit.a",
    ]
    (word,) = overrides(["dataset.path=[~/a,'~/b']"])
    assert OverridesParser.create().parse_overrides([word])[0].value() == ["/home/me/a", "/home/me/b"]
    assert overrides(["~method.foo", "a=b~/c"]) == ["~method.foo", "a=b~/c"]
    assert path_in('resume="/a b"') == "/a b" != path_in("resume='/a b")


def test_the_home_folder_is_that_of_the_user() -> None:
    assert overrides(["resume=~/run"]) == [f"resume={Path.home()}/run"]
    assert overrides(["cache=~", "a=[~,'~']"]) == [f"cache={Path.home()}", f"a=[{Path.home()},'{Path.home()}']"]
