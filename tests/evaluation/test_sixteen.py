"""Geirhos's 16 classes in ImageNet's 1,000, against WordNet's own ids and descriptions."""

import math

import pytest
import torch
from timm.data import ImageNetInfo

from icl_msr.evaluation.sixteen import SIXTEEN, members, sixteen

PUBLISHED = {
    "airplane": ["n02690373"],
    "bear": ["n02132136", "n02133161", "n02134084", "n02134418"],
    "bicycle": ["n02835271", "n03792782"],
    "boat": ["n02951358", "n03344393", "n03662601", "n04273569", "n04612504"],
    "bottle": ["n02823428", "n03937543", "n03983396", "n04557648", "n04560804", "n04579145", "n04591713"],
    "car": ["n02814533", "n03100240", "n04285008"],
    "cat": ["n02123045", "n02123159", "n02123394", "n02123597", "n02124075", "n02125311"],
    "chair": ["n02791124", "n03376595", "n04099969", "n04429376"],
    "clock": ["n02708093", "n03196217", "n04548280"],
    "elephant": ["n02504013", "n02504458"],
    "keyboard": ["n03085013", "n04505470"],
    "knife": ["n03041632"],
    "oven": ["n04111531"],
    "truck": [
        "n03345487", "n03417042", "n03770679", "n03796401", "n03930630", "n03977966", "n04461696", "n04467665",
    ],
}  # fmt: skip
"""Those WordNet ids of the paper's lists that ImageNet has; of birds and dogs see below."""
LIVING = {"bird": ("n01503061", "n02062017"), "dog": ("n02084071", "n02114100")}
"""Where WordNet begins with birds (dogs) and with what comes after them: ids are sorted by kind."""
WORDS = {
    "airplane": ["airliner"],
    "bear": ["bear"],
    "bicycle": ["bicycle", "bike"],
    "boat": ["canoe", "boat", "yawl"],
    "bottle": ["bottle", "jug"],
    "car": ["car", "wagon", "convertible"],
    "cat": ["cat", "cougar"],
    "chair": ["chair", "throne"],
    "clock": ["clock"],
    "elephant": ["elephant"],
    "keyboard": ["keyboard"],
    "knife": ["cleaver"],
    "oven": ["rotisserie"],
    "truck": ["truck", "van", "minivan", "wrecker", "lorry"],
}


def test_sizes() -> None:
    sizes = {name: len(numbers) for name, numbers in SIXTEEN.items()}
    assert sizes == {name: len(ids) for name, ids in PUBLISHED.items()} | {"bird": 49, "dog": 109}
    assert list(sizes) == sorted(sizes)
    everything = [k for numbers in SIXTEEN.values() for k in numbers]
    assert len(everything) == len(set(everything)) == 207
    assert set(everything) <= set(range(1000))
    assert members("2 4-6 9") == [2, 4, 5, 6, 9]


def test_members_are_what_wordnet_says() -> None:
    imagenet = ImageNetInfo()
    ids = imagenet.label_names()
    assert ids == sorted(ids)
    for name, numbers in SIXTEEN.items():
        if name in PUBLISHED:
            assert [ids[k] for k in numbers] == PUBLISHED[name]
            for k in numbers:
                words = imagenet.index_to_description(k).replace(",", " ").replace("-", " ").lower().split()
                assert any(word in words or word in "".join(words) for word in WORDS[name])
        else:
            first, after = LIVING[name]
            assert all(first <= ids[k] < after for k in numbers)


@pytest.mark.parametrize("scale", [1.0, 40.0, 2000.0])
def test_scores_against_a_loop(scale: float) -> None:
    scores = scale * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    found = sixteen(scores)
    for row, values in zip(found.tolist(), scores.double().tolist(), strict=True):
        largest = max(values)
        total = sum(math.exp(value - largest) for value in values)
        for mean, numbers in zip(row, SIXTEEN.values(), strict=True):
            expected = sum(math.exp(values[k] - largest) / total for k in numbers) / len(numbers)
            assert mean == pytest.approx(expected, rel=1e-9)


def test_the_mean_decides_and_not_the_sum() -> None:
    scores = torch.full((2, 1000), -30.0)
    scores[0, SIXTEEN["dog"]] = 0.0  # 109 times as likely as one class
    scores[0, 404] = 1.0
    scores[1, SIXTEEN["dog"]] = 0.0
    scores[1, 404] = -1.0
    names = list(SIXTEEN)
    assert [names[k] for k in sixteen(scores).argmax(1)] == ["airplane", "dog"]
