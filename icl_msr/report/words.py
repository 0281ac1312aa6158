"""Sentences about results, and numbers as text."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from icl_msr.core.records import ACCURACY, GAP, MEANINGS, TRAINED, UNTRAINED, Classifier, Measurement, Outcome, Records
from icl_msr.report.runs import Curve

LOSSES = (("mixed_same", "mixed_rand"), ("original", "mixed_rand"), ("full", "fg"), ("original", "only_fg"))
"""Gaps that measure the reliance on the background, the most informative first."""


def number(record: Measurement, value: float | None) -> str:
    """Return a value as text, in the unit of its record."""
    shown = record.scaled(value)
    if shown is None:
        return "–"
    if record.unit == "points":
        return points(shown)
    digits = ",.0f" if record.unit == "count" else ".1f" if record.unit == "fraction" else _digits(shown)
    return f"{shown:{digits}}".replace("-", "−")


def _digits(value: float) -> str:
    return ".3g" if abs(value) < 0.01 else ".3f" if abs(value) < 10 else ",.1f"


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent: 0.412 becomes `41.2 %`."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def points(value: float) -> str:
    """Return a number of points with its sign, with a true minus."""
    return f"{value:+.1f}".replace("-", "−")


def interval(record: Measurement) -> str:
    """Return the interval of a record, such as `9.8 to 14.7`; empty if it has none."""
    low, high = record.scaled(record.low), record.scaled(record.high)
    return "" if low is None or high is None else f"{low:.1f} to {high:.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Return a duration as text: 3671 seconds become `1 h 1 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def main_classifiers(records: Iterable[Measurement]) -> tuple[Classifier | None, Classifier | None]:
    """Return the linear probe, or else the fine-tuned classifier, and the first kNN preset; None for missing ones."""
    found = list(dict.fromkeys(record.classifier for record in records if record.classifier is not None))
    fitted = (one for family in ("linear", "finetune") for one in found if one.family == family)
    return next(fitted, None), next((one for one in found if one.family == "knn"), None)


def main_classifier(records: Records) -> Classifier | None:
    """Return the classifier of the answer: the first of linear probe, fine-tuned classifier and kNN that has a gap.

    Without any gap it is the first of them.
    """
    found = [one for one in main_classifiers(records.where(ACCURACY.kind)) if one is not None]
    return next((one for one in found if telling_gap(records, one)), found[0] if found else None)


def telling_gap(records: Records, classifier: Classifier, encoder: str = TRAINED) -> Measurement | None:
    """Return the most informative gap of the classifier fitted on train; None if no gap was measured."""
    known = {"classifier": str(classifier), "fitted_on": "train", "encoder": encoder}
    gaps = (records.find(GAP.kind, split=split, minus=minus, **known) for split, minus in LOSSES)
    return next((gap for gap in gaps if gap is not None), None)


def answer(outcome: Outcome) -> list[str]:
    """Return sentences on what was measured, first on object or background, or else on the worst group."""
    records = outcome.records
    classifier = main_classifier(records)
    shape, looks = _shape(records), _attention(records)
    if classifier is None and looks:
        return looks
    if classifier is None and records.where("health"):
        return [
            "This run had no labels of two or more classes, so nothing can be said about object and background. The "
            "measures below need no labels."
        ]
    if classifier is None:
        return ["This run was not evaluated, so nothing can be said about object and background."]
    linear = classifier.family == "linear"
    who = f"A {'linear probe' if linear else f'{classifier} classifier'} on the frozen encoder"
    if classifier.family == "finetune":
        who = "The fine-tuned encoder"
    if classifier.fraction < 1:
        who += f" with {100 * classifier.fraction:g} % of the labels"
    further = [*_reliance(records, classifier), *shape]
    splits = {record.split for record in records.where(ACCURACY.kind) if record.fitted_on != "stimuli"}
    if shape and splits <= {"conflict_shape", "conflict_texture"}:
        return shape
    gap = telling_gap(records, classifier)
    if gap is None:
        untold = (
            "Object and background were not told apart here, so the run cannot tell which of the two "
            "the encoder relies on."
        )
        worst = _worst_group(records, classifier, who)
        return [*(worst + looks or [untold]), *_elsewhere(records, classifier, who), *further]
    untrained = telling_gap(records, classifier, UNTRAINED)
    sentences = [f"{who} {_lost(gap)} when {MEANINGS[gap.split, gap.minus]}{_significance(gap)}."]
    if untrained:
        sentences.append(f"On the untrained encoder it {_lost(untrained)}.")
    return [
        *sentences,
        *_alone(outcome, classifier),
        *_worst_group(records, classifier, "It"),
        *_decodable(records, classifier),
        *looks,
        *further,
    ]


def _lost(gap: Measurement) -> str:
    value, low, high = gap.value or 0.0, gap.low, gap.high
    verb, bounds = "loses", interval(gap)
    if value < 0 and low is not None and high is not None:
        bounds = f"{-high:.1f} to {-low:.1f}".replace("-", "−")
    if value < 0:
        verb = "gains"
    return f"{verb} {abs(value):.1f} points" + (f" (95 % interval {bounds})" if bounds else "")


def _significance(gap: Measurement) -> str:
    if gap.low is None or gap.high is None or not gap.low <= 0 <= gap.high:
        return ""
    return ": not distinguishable from no loss at all"


def _elsewhere(records: Records, classifier: Classifier, who: str) -> list[str]:
    """Return sentences on the accuracy on the first test split, and on the loss on other splits."""
    known = {"classifier": str(classifier), "fitted_on": "train", "encoder": TRAINED}
    scores = records.where(ACCURACY.kind, **known)
    if not scores:
        return []
    gaps = records.where(GAP.kind, split=scores[0].split, **known)
    lost = [f"{_lost(gap)} on {gap.minus}" for gap in gaps]
    others = "" if lost else "".join(f", {percent(record.value)} on {record.split}" for record in scores[1:])
    first = f"{who} reaches {percent(scores[0].value)} on {scores[0].split}{others}."
    return [first, f"It {', '.join(lost)}."] if lost else [first]


def _alone(outcome: Outcome, classifier: Classifier) -> list[str]:
    """Return a sentence on the accuracy from the object only and from the background only."""
    known = {"classifier": str(classifier), "fitted_on": "train", "encoder": TRAINED}
    fg, bg = (outcome.records.find(ACCURACY.kind, split=split, **known) for split in ("only_fg", "only_bg"))
    if fg is None or bg is None:
        return []
    chance = "" if outcome.chance is None else f"; chance is {percent(outcome.chance)}"
    return [
        f"It names {percent(fg.value)} of the images from the object alone "
        f"and {percent(bg.value)} from the background alone{chance}."
    ]


def _decodable(records: Records, classifier: Classifier) -> list[str]:
    """Return a sentence on a probe that cannot use the background: how often it reads the object from the features."""
    known = {"split": "mixed_rand", "classifier": str(classifier), "fitted_on": "balanced"}
    trained, untrained = (records.find(ACCURACY.kind, encoder=encoder, **known) for encoder in (TRAINED, UNTRAINED))
    if trained is None:
        return []
    bounds = interval(trained)
    return [
        "The object itself is in the features to this degree: a probe fitted on backgrounds that say nothing about "
        f"the class is right on {percent(trained.value)} of the images with a random background"
        + (f" (95 % interval {bounds})" if bounds else "")
        + (f", against {percent(untrained.value)} for the untrained encoder." if untrained else ".")
    ]


def _worst_group(records: Records, classifier: Classifier, who: str) -> list[str]:
    """Return a sentence on the worst group, on the average, and on a probe that was fitted on balanced groups."""
    known = {"classifier": str(classifier), "encoder": TRAINED}
    worst, average = (records.find("groups", metric=m, fitted_on="train", **known) for m in ("worst", "average"))
    if worst is None or average is None:
        return []
    others = (r for r in records.where("groups", metric="worst", **known) if r.fitted_on != "train")
    balanced = next(others, None)
    return [
        f"{who} is right on {percent(worst.value)} (95 % interval {interval(worst)}) of its worst group, {worst.note}, "
        f"against {percent(average.value)} on average"
        + (f"; fitted on as many images of each group, on {percent(balanced.value)}." if balanced else ".")
    ]


def _reliance(records: Records, classifier: Classifier) -> list[str]:
    """Return a sentence on the share of the clean accuracy that is left without each cue, the smallest first."""
    left = records.where("reliance", metric="relative", classifier=str(classifier), encoder=TRAINED)
    if not left:
        return []
    first, *rest = sorted(left, key=lambda record: record.value or 0.0)
    others = "".join(f", without {record.told('cue')} {percent(record.value)}" for record in rest)
    return [f"Without {first.told('cue')}, {percent(first.value)} of the clean accuracy is left{others}."]


def _attention(records: Records) -> list[str]:
    """Return a sentence on the share of class activation maps that is on the object."""
    shares = records.where("attention", metric="share", encoder=TRAINED)
    if not shares:
        return []
    share = shares[-1]  # Grad-CAM, if there is one
    known = {"map": share.told("map"), "split": share.split}
    blind, untrained = (
        records.find("attention", metric=metric, encoder=encoder, **known)
        for metric, encoder in (("share_elsewhere", TRAINED), ("share", UNTRAINED))
    )
    return [
        f"Of its {share.told('map')} maps, {percent(share.value)} (95 % interval {interval(share)}) is on the object"
        + (f"; it would be {percent(blind.value)} if they did not see it" if blind else "")
        + (f", and is {percent(untrained.value)} for the untrained encoder." if untrained else ".")
    ]


def _shape(records: Records) -> list[str]:
    """Return sentences on decisions between shape and texture, and on what probes read of both."""
    biased = next(
        (r for r in records.where("shape", metric="shape_bias", encoder=TRAINED) if r.value is not None), None
    )
    read = records.where("decodability", metric="accuracy", encoder=TRAINED)
    chance = records.find("decodability", metric="chance")
    sentences = []
    if biased is not None:
        known = {"classifier": str(biased.classifier), "encoder": TRAINED}
        decided = records.find("shape", metric="decided", **known)
        head = biased.classifier is not None and biased.classifier.family == "head"
        whose = "its own classifier" if head else f"a {biased.classifier} classifier on the encoder"
        images = "images" if decided is None else f"{decided.value:.0f} images"
        sentences.append(
            f"Where shape and texture contradict each other, {whose} goes by the shape in "
            f"{percent(biased.value)} (95 % interval {interval(biased)}) of the {images} that it names by either."
        )
    if read and chance:
        both = " and ".join(f"the {record.told('cue')} of {percent(record.value)}" for record in read)
        sentences.append(f"Fitted to other stimuli, probes read {both}; chance is {percent(chance.value)}.")
    return sentences


CLEARLY = 0.1
"""Fraction of the object's area by which a whole interval must differ from a map that does not see the object."""


def strata(records: Records) -> list[str]:
    """Return sentences on whether a stratum sees only the background and whether strata differ, if measured."""
    area, apart = records.find("strata_area"), records.find("strata_apart", metric="difference")
    if area is None or area.value is None:
        return []
    excess = [record for record in records.where("strata", metric="excess") if isinstance(record.told("stratum"), int)]
    clearly = 100 * CLEARLY * area.value  # points
    outside = [record for record in excess if (record.high or 0) < -clearly]
    inside = [record for record in excess if (record.low or 0) > clearly]
    if outside:
        least = min(outside, key=lambda record: record.value or 0).told("stratum")
        share, place = (records.where("strata", metric=m, stratum=least)[0].value for m in ("share", "by_place"))
        first = (
            f"{_these(outside).capitalize()} clearly less activation on the object than a map that does not see it: "
            f"stratum {least} has {percent(share)} instead of {percent(place)}"
        )
    else:
        first = "No stratum avoids the object: none has clearly less activation there than a map that does not see it"
    first += f"; {_these(inside)} clearly more." if inside else ", and none has clearly more."
    if apart is None or apart.value is None:
        return [first]
    by = f"{points(apart.value)} points (95 % interval {interval(apart)})"
    if (apart.low or 0) <= clearly:
        return [first, f"All strata look at about the same place: the two that differ most are {by} apart."]
    more, less = (int(records.where("strata_apart", metric=m)[0].value or 0) for m in ("more", "less"))
    return [first, f"They differ: stratum {more} has more of it on the object than stratum {less}: {by}."]


def _these(records: Sequence[Measurement]) -> str:
    names = [str(record.told("stratum")) for record in records]
    if len(names) == 1:
        return f"stratum {names[0]} has"
    return f"strata {', '.join(names[:-1])} and {names[-1]} have"


FAINT = 0.01
"""Fraction of the uniformity gradient below which f_msr learns from uniformity alone."""


def faint_meta_signal(curves: Mapping[str, Curve], regularizer: Mapping[str, Any]) -> str:
    """Return a warning, with advice, if the meta gradient was too small to matter; else an empty string.

    Args:
        curves: the run's log.
        regularizer: its config.
    """
    meta, spread = (curves.get(f"msr/{part}_grad_norm") for part in ("meta", "uniformity"))
    if meta is None or spread is None:
        return ""
    at = dict(zip(spread.steps, spread.values, strict=True))
    ratios = [value / at[step] for step, value in zip(*meta, strict=True) if at.get(step)]
    if not ratios or median(ratios) >= FAINT:
        return ""
    cure = "a smaller regularizer.gamma"
    if regularizer.get("weights") == "joint":
        cure = f"a larger regularizer.lam or {cure}"
    elif regularizer.get("alpha") == "lr":
        cure = "regularizer.alpha=relative"
    elif "relative_step" in regularizer:
        step = regularizer["relative_step"]
        cure = f"a larger regularizer.relative_step (it was {step:g}; try {10 * step:g}) or {cure}"
    share = f"{100 * median(ratios):.2g} %"
    return (
        f"The meta gradient was {share} of the uniformity gradient (median of {len(ratios)} logged steps), "
        f"so f_msr learnt from uniformity alone; type {cure}."
    )


def readable(value: Any) -> str:
    """Return a setting or a measurement as readable text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(readable(item) for item in value)
    return str(value)
