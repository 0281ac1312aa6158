"""Numbers said in words."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from icl_msr.report.runs import Accuracy, Curve, Gap, Look, Results, Share
from icl_msr.report.summary import Configuration, Metric, headline, main_classifiers

GAPS = {
    "bg_gap": ("mixed_same − mixed_rand", "the background is swapped for one of a random class"),
    "original - mixed_rand": ("original − mixed_rand", "the background is swapped for one of a random class"),
    "original - only_fg": ("original − only_fg", "the background is taken away"),
    "full - fg": ("full − fg", "everything but the object is taken away"),
    "fg - crop": ("fg − crop", "gained by cropping to the object and not anywhere"),
    "only_bg - chance": ("only_bg − chance", "above chance from the background alone"),
}
"""Gap -> (the difference in plain symbols, what happens to the image)."""
LOSSES = ("bg_gap", "original - mixed_rand", "full - fg", "original - only_fg")
"""Gaps that measure the reliance on the background, the most telling first."""


def percent(fraction: float) -> str:
    """0.412 -> 41.2 %."""
    return f"{100 * fraction:.1f} %"


def points(value: float) -> str:
    """Signed, with a true minus."""
    return f"{value:+.1f}".replace("-", "−")


def interval(low: float | None, high: float | None, scale: float = 1) -> str:
    """`9.8 to 14.7`; empty where unknown."""
    return "" if low is None or high is None else f"{scale * low:.1f} to {scale * high:.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """3671 -> 1 h 1 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def fitted(fitted_on: str) -> str:
    """What a classifier was fitted on."""
    return {
        "train": "the training set",
        "balanced": "the balanced split",
        "own": "data of its own",
    }.get(fitted_on, fitted_on)


def find_accuracy(results: Results, split: str, classifier: str, fitted_on: str, encoder: str) -> Accuracy | None:
    """The one accuracy asked for, where measured."""
    key = (split, classifier, fitted_on, encoder)
    return next((a for a in results.accuracies if (a.split, a.classifier, a.fitted_on, a.encoder) == key), None)


def find_gap(results: Results, gap: str, classifier: str, fitted_on: str, encoder: str) -> Gap | None:
    """The one gap asked for, where measured."""
    key = (gap, classifier, fitted_on, encoder)
    return next((g for g in results.gaps if (g.gap, g.classifier, g.fitted_on, g.encoder) == key), None)


def main_classifier(results: Results) -> str | None:
    """The classifier the answer is about: the linear probe, else what was fine-tuned, else kNN."""
    linear, knn = main_classifiers(Metric(a.split, a.classifier, a.fitted_on) for a in results.accuracies)
    return linear or knn


def answer(results: Results) -> list[str]:
    """How much the encoder relies on the object and how much on the background: sentences, the main one first."""
    classifier = main_classifier(results)
    if classifier is None and results.health:
        return [
            "This run had no labels of two or more classes, so nothing can be said about object and background; what "
            "needs no label is below."
        ]
    if classifier is None:
        return ["This run was not evaluated, so nothing can be said about object and background."]
    gaps = (find_gap(results, name, classifier, "train", "trained") for name in LOSSES)
    gap = next((gap for gap in gaps if gap is not None), None)
    who = f"A {'linear probe' if classifier.startswith('linear') else f'{classifier} classifier'} on the frozen encoder"
    if classifier.startswith("finetune"):
        who = "The fine-tuned encoder"
    if classifier.endswith("%"):
        who += f" with {classifier.rpartition('-')[2].replace('%', ' %')} of the labels"
    shape = _shape(results)
    splits = {a.split for a in results.accuracies if a.fitted_on != "stimuli"}
    if shape and splits <= {"conflict_shape", "conflict_texture"}:
        return shape
    if gap is None:
        return [
            "Object and background were not told apart here, so the run cannot tell which of the two "
            "the encoder relies on.",
            *_elsewhere(results, classifier, who),
            *shape,
        ]
    untrained = find_gap(results, gap.gap, classifier, "train", "untrained")
    sentences = [f"{who} {_lost(gap)} when {GAPS[gap.gap][1]}{_significance(gap)}."]
    if untrained:
        sentences.append(f"On the untrained encoder it {_lost(untrained)}.")
    return [*sentences, *_alone(results, classifier), *_decodable(results, classifier), *shape]


def comparison(rows: list[Configuration]) -> str:
    """Which configuration of one data set relies least on the background; empty where that was not measured."""
    gap = next((metric for name in LOSSES for metric in headline(rows) if metric.quantity == name), None)
    # Pre-training on the foreground alone is another question.
    measured = [row for row in rows if gap in row.metrics and row.runs[0].results.train_on != "fg"]
    if gap is None or len(measured) < 2:
        return ""
    least, *_, most = sorted(measured, key=lambda row: row.metrics[gap].mean)
    return (
        f"When {GAPS[gap.quantity][1]}, {least.label} loses least on average, {least.metrics[gap]} points, "
        f"and {most.label} most, {most.metrics[gap]} points."
    )


def _lost(gap: Gap) -> str:
    verb = "loses" if gap.points >= 0 else "gains"
    low, high = (gap.low, gap.high) if gap.points >= 0 or gap.low is None or gap.high is None else (-gap.high, -gap.low)
    bounds = interval(low, high)
    return f"{verb} {abs(gap.points):.1f} points" + (f" (95 % interval {bounds})" if bounds else "")


def _significance(gap: Gap) -> str:
    if gap.low is None or gap.high is None or not gap.low <= 0 <= gap.high:
        return ""
    return ": not distinguishable from no loss at all"


def _elsewhere(results: Results, classifier: str, who: str) -> list[str]:
    """Accuracy on the first test split, and what is lost on others."""
    scores = [
        a for a in results.accuracies if (a.classifier, a.fitted_on, a.encoder) == (classifier, "train", "trained")
    ]
    if not scores:
        return []
    lost = [
        f"{_lost(gap)} on {gap.gap.partition(' - ')[2]}"
        for gap in results.gaps
        if (gap.classifier, gap.fitted_on, gap.encoder) == (classifier, "train", "trained")
        and gap.gap.startswith(f"{scores[0].split} - ")
    ]
    others = "" if lost else "".join(f", {percent(a.top1)} on {a.split}" for a in scores[1:])
    first = f"{who} reaches {percent(scores[0].top1)} on {scores[0].split}{others}."
    return [first, f"It {', '.join(lost)}."] if lost else [first]


def _alone(results: Results, classifier: str) -> list[str]:
    """What object and background are each good for alone."""
    fg = find_accuracy(results, "only_fg", classifier, "train", "trained")
    bg = find_accuracy(results, "only_bg", classifier, "train", "trained")
    if fg is None or bg is None:
        return []
    chance = "" if results.chance is None else f"; chance is {percent(results.chance)}"
    return [
        f"It names {percent(fg.top1)} of the images from the object alone "
        f"and {percent(bg.top1)} from the background alone{chance}."
    ]


def _decodable(results: Results, classifier: str) -> list[str]:
    """Whether the object can be read from the features by a probe to which the background is of no use."""
    trained = find_accuracy(results, "mixed_rand", classifier, "balanced", "trained")
    if trained is None:
        return []
    untrained = find_accuracy(results, "mixed_rand", classifier, "balanced", "untrained")
    bounds = interval(trained.low, trained.high, 100)
    text = (
        "The object itself is in the features to this degree: a probe fitted where the background says nothing about "
        f"the class is right on {percent(trained.top1)} of the images with a random background"
    )
    return [
        text
        + (f" (95 % interval {bounds})" if bounds else "")
        + (f", against {percent(untrained.top1)} for the untrained encoder." if untrained else ".")
    ]


def _shape(results: Results) -> list[str]:
    """What decides where shape and texture contradict each other, and what can be read of both."""
    biased = next((row for row in results.shape if row["encoder"] == "trained" and row["shape_bias"] is not None), None)
    read = {row["cue"]: row for row in results.decodability if row["encoder"] == "trained"}
    sentences = []
    if biased is not None:
        whose = (
            "its own classifier"
            if biased["classifier"] == "head"
            else f"a {biased['classifier']} classifier on the encoder"
        )
        sentences.append(
            f"Where shape and texture contradict each other, {whose} goes by the shape in "
            f"{percent(biased['shape_bias'])} (95 % interval {interval(biased['low'], biased['high'], 100)}) of the "
            f"{biased['decided']} images that it names by either."
        )
    if read:
        both = " and ".join(f"the {cue} of {percent(row['accuracy'])}" for cue, row in read.items())
        chance = percent(next(iter(read.values()))["chance"])
        sentences.append(f"Fitted to other stimuli, probes read {both}; chance is {chance}.")
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


CLEARLY = 0.1
"""Of the object's area: how far the whole interval must be from a map that does not see the object."""


def strata(look: Look) -> list[str]:
    """Whether a stratum looks at the background only, and whether strata differ: sentences."""
    named = [share for share in look.shares if share.stratum.isdigit()]
    outside = [share for share in named if share.excess_high < -CLEARLY * look.area]
    inside = [share for share in named if share.excess_low > CLEARLY * look.area]
    if outside:
        least = min(outside, key=lambda share: share.excess)
        first = (
            f"{_these(outside).capitalize()} clearly less activation on the object than a map that does not see it: "
            f"stratum {least.stratum} has {percent(least.share)} instead of {percent(least.by_place)}"
        )
    else:
        first = "No stratum avoids the object: none has clearly less activation there than a map that does not see it"
    first += f"; {_these(inside)} clearly more." if inside else ", and none has clearly more."
    gap = look.difference
    if gap is None:
        return [first]
    apart = f"{points(100 * gap.points)} points (95 % interval {interval(gap.low, gap.high, 100)})"
    if gap.low <= CLEARLY * look.area:
        return [first, f"All strata look at about the same place: the two that differ most are {apart} apart."]
    return [first, f"They differ: stratum {gap.more} has more of it on the object than stratum {gap.less}: {apart}."]


def _these(shares: Sequence[Share]) -> str:
    names = [share.stratum for share in shares]
    if len(names) == 1:
        return f"stratum {names[0]} has"
    return f"strata {', '.join(names[:-1])} and {names[-1]} have"


FAINT = 0.01
"""Of the uniformity gradient: below this, f_msr learns from uniformity alone."""


def faint_meta_signal(curves: Mapping[str, Curve], regularizer: Mapping[str, Any]) -> str:
    """What is wrong with a run in which the meta gradient was too small to matter, and what to type; else empty.

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
    """A setting or a measurement as a person writes it."""
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
