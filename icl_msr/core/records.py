"""Records of what was measured, their layout in tables and plots, and the file `results.json`.

A record holds one number. An evaluation makes records, and defines in a `Layout` which table and which plot show them.
The report, the dashboards and a sweeper read records. No other code has to know a new kind of record.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from icl_msr.core.errors import UserError
from icl_msr.core.storage import read_json, readable

Read = TypeVar("Read")
Unit = Literal["fraction", "points", "count", "number"]
"""The unit of a value. Fractions are shown in per cent. Points are differences of percentages."""
TRAINED, UNTRAINED = "trained", "untrained"
"""Names of the encoder that is evaluated, and of the untrained one that it is compared with."""
CHANCE = "chance"
"""A name in place of a split, for the accuracy of guessing."""


def dashboard_name(name: str) -> str:
    """Return the name of a number with letters, digits, underscores and slashes only, which every dashboard takes."""
    return re.sub(r"[^\w/]+", "_", name.replace(" - ", "_minus_").replace("%", "pct"))


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier that predicts the classes of images."""

    family: str
    """`linear` or `knn` on frozen features, `finetune`, or `head`, the classifier that the encoder came with."""
    preset: str = ""
    """Preset that it is fitted with, such as `dino`; empty for the default."""
    fraction: float = 1.0
    """Fraction of the labels that it is fitted with."""

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f"{100 * self.fraction:g}%"
        return "-".join(filter(None, (self.family, self.preset, part)))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number, with everything that says what it measures."""

    kind: str
    """Records of one kind share a `Layout`."""
    metric: str = "accuracy"
    value: float | None
    """None if the measure has no value, such as the rank of features that are all zero."""
    low: float | None = None
    high: float | None = None
    """Upper end of the 95 % interval; `low` is the lower one."""
    n: int | None = None
    """Number of images."""
    unit: Unit = "fraction"
    better: Literal["more", "less", "neither"] = field(default="more", compare=False)
    """The direction of better values; `less` means nearer to zero."""
    encoder: str = TRAINED
    classifier: Classifier | None = None
    fitted_on: str = ""
    """`train` or `balanced`; `stimuli` for probes fitted to the stimuli, `own` for the encoder's own classifier."""
    split: str = ""
    minus: str = ""
    """For a difference, the split that is subtracted from `split`, or `CHANCE`."""
    factors: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    """Other properties that distinguish records of one kind, such as `{"corruption": "fog", "severity": 3}`."""
    note: str = ""

    def __post_init__(self) -> None:
        if taken := _OWN & self.factors.keys():
            raise ValueError(f"a record has a field {min(taken)} of its own, so no factor can have this name")

    @property
    def splits(self) -> str:
        """The split, such as `mixed_rand`, or the difference, such as `mixed_same - mixed_rand`."""
        return f"{self.split} - {self.minus}" if self.minus else self.split

    @property
    def name(self) -> str:
        """The name of this number, as a user types it: `linear/balanced/mixed_rand`. The encoder is not part of it."""
        usual = self.kind in (ACCURACY.kind, GAP.kind)
        kind, metric = "" if usual else self.kind, "" if self.metric == "accuracy" else self.metric
        parts = (kind, metric, self.classifier or "", self.fitted_on, self.splits, *self.factors.values())
        return "/".join(str(part) for part in parts if part != "")

    @property
    def dashboard_name(self) -> str:
        """The name of this number on a dashboard. A difference ends in its unit, points."""
        return dashboard_name(f"{self.name}_points" if self.unit == "points" else self.name)

    @property
    def identity(self) -> Self:
        """The record without its number. It is equal for the same measure in two runs."""
        return replace(self, value=None, low=None, high=None, n=None, note="")

    @property
    def shown(self) -> float | None:
        """The value for display, with fractions in per cent."""
        return self.scaled(self.value)

    def scaled(self, value: float | None) -> float | None:
        """Return a value of this record's unit for display, with fractions in per cent."""
        return 100 * value if value is not None and self.unit == "fraction" else value

    def told(self, by: str) -> Any:
        """Return the value of a field, factor or `splits`, or None if it is empty. A classifier becomes its name."""
        value = getattr(self, by) if by in _OWN or by == "splits" else self.factors.get(by)
        return None if value in (None, "") else str(value) if by == "classifier" else value

    def row(self) -> dict[str, Any]:
        """Return the record as a flat row with factors and the classifier's fields as columns, without empty ones."""
        row: dict[str, Any] = {"encoder": self.encoder, **({} if self.classifier is None else vars(self.classifier))}
        row |= {"fitted_on": self.fitted_on, "split": self.split, "minus": self.minus, **self.factors}
        row |= {"metric": self.metric, "value": self.value, "low": self.low, "high": self.high, "n": self.n}
        row |= {"unit": self.unit, "better": self.better, "note": self.note}
        usual = {"fraction": 1, "better": "more"}
        return {k: v for k, v in row.items() if k == "value" or (v not in (None, "") and (k, v) not in usual.items())}

    @classmethod
    def read(cls, kind: str, row: Mapping[str, Any], where: str) -> Self:
        """Return the record of a `row`.

        Raises:
            ValueError: a value has the wrong type.
        """
        parts = [f.name for f in fields(Classifier)]
        classifier = {key: row[key] for key in parts if key in row} or None
        known = {key: value for key, value in row.items() if key in _OWN}
        factors = {key: value for key, value in row.items() if key not in _OWN and key not in parts}
        return read(cls, {**known, "kind": kind, "classifier": classifier, "factors": factors}, where)


_OWN = frozenset(f.name for f in fields(Measurement)) - {"factors"}


@dataclass(frozen=True, kw_only=True)
class ByClass:
    """The accuracy of one classifier on each class of a test split, and its confusions."""

    encoder: str
    classifier: Classifier
    fitted_on: str
    split: str
    accuracies: list[float | None]
    """Accuracies in [0, 1], in the order of the classes; None for a class without images."""
    classes: list[str] | None = None
    """The names of the classes; None for those of the data set, in its order."""
    confused: list[list[Any]] = field(default_factory=list)
    """[true class, predicted class, images]: the ten largest confusions."""
    confusion: list[list[int]] | None = None
    """Images by true class (rows) and predicted class (columns); None if there are too many classes."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot of records, with a panel, a place on the axis and a series for each value of `panel`, `axis`, `series`."""

    axis: str
    """Name of a field or factor."""
    series: tuple[str, ...]
    panel: str = ""
    where: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Properties of the records that are drawn, such as `{"metric": "excess"}`; by default all records are drawn."""
    shape: Literal["dots", "lines"] = "dots"
    """Lines need an axis of numbers."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of the records of one kind in tables and plots."""

    kind: str
    title: str
    rows: tuple[str, ...]
    """Fields and factors that identify a line of the table."""
    columns: tuple[str, ...] = ("metric",)
    """Fields and factors that identify a column."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Words shown in place of a name or a value."""
    details: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Small text below a name or a value."""
    about: str = ""
    """A paragraph before the table."""
    count: str = ""
    """The heading of the column with the number of images; no such column if empty."""
    notes: str = ""
    """The heading of the column with the notes; no such column if empty."""
    heat: bool = False
    """True if cells are coloured by their value."""
    folded: bool = False
    """True if the page hides the table until the reader opens it."""
    chart: Chart | None = None


ACCURACY = Layout(
    kind="accuracy",
    title="Accuracy, %",
    rows=("fitted_on", "classifier", "encoder"),
    columns=("split",),
    labels={"fitted_on": "fitted on", "own": "data of its own"},
    about="Per cent, with 95 % intervals over images. Fitted on the training set, a classifier may use the background "
    "as far as it agrees with the class there. Fitted on a balanced split it cannot, and shows how much of the object "
    "is in the features.",
    heat=True,
    chart=Chart(
        axis="split",
        series=("classifier", "encoder"),
        panel="fitted_on",
        note="Bars are 95 % intervals over images. The dashed line is chance.",
    ),
)
MEANINGS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("mixed_same", "mixed_rand"): "the background is swapped for one of a random class",
        ("original", "mixed_rand"): "the background is swapped for one of a random class",
        ("full", "fg"): "everything but the object is taken away",
        ("original", "only_fg"): "the background is taken away",
        ("fg", "crop"): "gained by cropping to the object instead of anywhere",
        ("only_bg", CHANCE): "above chance from the background alone",
        ("clean", "marked"): "a translucent mark is drawn over the images",
    }
)
"""The change to the image between two splits."""
GAP = Layout(
    kind="gap",
    title="Gaps, points",
    rows=("splits", "classifier"),
    columns=("encoder", "fitted_on"),
    labels={"splits": "gap", "mixed_same - mixed_rand": "BG-gap", "train": "on train", "balanced": "on balanced"},
    details={f"{first} - {second}": meaning for (first, second), meaning in MEANINGS.items()}
    | {"mixed_same - mixed_rand": "mixed_same − mixed_rand: the background is swapped for one of a random class"},
    about="Percentage points, with 95 % intervals: the first split minus the second.",
)


@dataclass
class Records:
    """All records of an encoder, or of a trained and an untrained one."""

    measurements: list[Measurement] = field(default_factory=list)
    by_class: list[ByClass] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    """Layouts by kind. Records of a kind without a layout are in no table."""

    def add(self, layout: Layout, *records: Measurement) -> None:
        """Append records, and set their layout."""
        self.layouts[layout.kind] = layout
        self.measurements += records

    def join(self, other: "Records") -> None:
        """Append the records of another evaluation of the same encoders. Existing records are kept."""
        self.layouts = self.layouts | other.layouts | self.layouts
        self.measurements = list(dict.fromkeys([*self.measurements, *other.measurements]))
        self.by_class += [record for record in other.by_class if record not in self.by_class]

    def where(self, kind: str, **known: Any) -> list[Measurement]:
        """Return the records of one kind with the given values of fields and factors. A classifier is given by name."""
        return [
            record
            for record in self.measurements
            if record.kind == kind and all(record.told(by) == value for by, value in known.items())
        ]

    def find(self, kind: str, **known: Any) -> Measurement | None:
        """Return the first record that `where` finds, or None."""
        return next(iter(self.where(kind, **known)), None)

    def kinds(self) -> list[str]:
        """Return the kinds of the records. Those with a layout come first, in the order of the layouts."""
        there = dict.fromkeys(record.kind for record in self.measurements)
        return [kind for kind in dict.fromkeys([*self.layouts, *there]) if kind in there]

    def findings(self) -> list[Measurement]:
        """Return the records with results: no counts, and no kinds that the page hides until the reader opens them."""
        hidden = {layout.kind for layout in self.layouts.values() if layout.folded}
        return [r for r in self.measurements if r.value is not None and r.unit != "count" and r.kind not in hidden]

    def numbers(self) -> dict[str, float]:
        """Return the findings on the trained encoder by the name that a user types."""
        return {r.name: value for r, value in self._trained()}

    def dashboard_numbers(self) -> dict[str, float]:
        """Return the findings on the trained encoder by their name on a dashboard."""
        return {r.dashboard_name: value for r, value in self._trained()}

    def _trained(self) -> list[tuple[Measurement, float]]:
        return [(r, r.value) for r in self.findings() if r.encoder == TRAINED and r.value is not None]

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return flat rows by kind."""
        return {kind: [record.row() for record in self.where(kind)] for kind in self.kinds()}

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` reads."""
        return {
            "records": self.rows(),
            "by_class": [asdict(record) for record in self.by_class],
            "layouts": [asdict(layout) for layout in self.layouts.values()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Records":
        """Return the records that `to_json` wrote.

        Raises:
            ValueError: the data is damaged; the message says where.
        """
        kinds = fit(content.get("records", {}), dict[str, list[dict[str, Any]]], "records")
        return cls(
            [
                Measurement.read(kind, row, f"records.{kind}.{i}")
                for kind, rows in kinds.items()
                for i, row in enumerate(rows)
            ],
            fit(content.get("by_class", []), list[ByClass], "by_class"),
            {layout.kind: layout for layout in fit(content.get("layouts", []), list[Layout], "layouts")},
        )


@dataclass(kw_only=True)
class Outcome:
    """The content of `results.json` of a run or an evaluation. Only the fields without a default are required."""

    seed: int
    name: str = "run"
    choices: Mapping[str, str | None] = field(default_factory=dict)
    evaluation_seed: int | None = None
    encoder: str = ""
    """The source of the encoder, if it is not from this run."""
    train_on: str | None = None
    classes: list[str] = field(default_factory=list)
    chance: float | None = None
    derived: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    wall_time_s: float | None = None
    images_per_second: float | None = None
    peak_memory_mb: float | None = None
    metric: dict[str, Any] = field(default_factory=dict)
    """`name` and `value` of the number that a sweeper maximises."""
    final: dict[str, float | None] = field(default_factory=dict)
    """The last value of every logged number."""
    records: Records = field(default_factory=Records)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "records"}
        return about | self.records.to_json()

    def numbers(self) -> dict[str, float]:
        """Return all numbers by the name that a user types: logged values, findings, the cost and the metric."""
        return self._with_cost(self.final, self.records.numbers())

    def dashboard_numbers(self) -> dict[str, float]:
        """Return all numbers by their name on a dashboard."""
        final = {dashboard_name(name): value for name, value in self.final.items()}
        return self._with_cost(final, self.records.dashboard_numbers())

    def _with_cost(self, final: Mapping[str, float | None], findings: Mapping[str, float]) -> dict[str, float]:
        cost = {name: getattr(self, name) for name in ("images_per_second", "peak_memory_mb", "wall_time_s")}
        found = {**final, **findings, **cost, "metric": self.metric.get("value")}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def load(cls, folder: Path) -> "Outcome":
        """Read `results.json` of a folder.

        Raises:
            UserError: the file is missing or damaged.
        """
        file, advice = folder / "results.json", "restore it from a copy, or remove it and repeat the command of the run"
        try:
            with readable(file, advice):
                content = read_json(file, advice)
                found = read(cls, {key: value for key, value in content.items() if key != "records"}, "")
                fit(found.metric.get("value"), float | None, "metric.value")
                found.records = Records.from_json(content)
                return found
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no results.json: the run failed or has not ended; give the folder of a finished run."
            ) from None


def chosen_metric(name: str, outcome: Outcome) -> tuple[str, float]:
    """Return the name and the value of the number that a sweeper maximises; the value is NaN if it was not measured.

    `auto` chooses the accuracy that rewards the background least. It prefers the linear probe to other classifiers, the
    balanced fitting set to train, and the split `mixed_rand` to others. Without an evaluation it is the online kNN.
    """
    if name == "auto":
        accuracies = outcome.records.where(ACCURACY.kind, encoder=TRAINED)

        def preference(record: Measurement) -> tuple[bool, ...]:
            linear = record.classifier is not None and record.classifier.family == "linear"
            return not linear, record.fitted_on != "balanced", record.split != "mixed_rand"

        name = min(accuracies, key=preference).name if accuracies else "online/knn"
    value = (outcome.records.numbers() | outcome.final).get(name)
    return name, math.nan if value is None else value


def read(kind: type[Read], values: Mapping[str, Any], where: str) -> Read:
    """Return a dataclass made from plain data. Keys that it does not have are ignored.

    Raises:
        ValueError: a value is missing or has the wrong type.
    """
    hints, found = _hints(kind), {}  # type: ignore[arg-type]
    for f in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{f.name}".lstrip(".")
        if f.name in values:
            found[f.name] = fit(values[f.name], hints[f.name], place)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{place} is missing")
    return kind(**found)


def fit(value: Any, kind: Any, where: str) -> Any:
    """Return plain data as a value of type `kind`: mappings become dataclasses, lists become tuples.

    Raises:
        ValueError: the data does not have this type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        if value is None and type(None) in inner:
            return None
        members = [member for member in inner if member is not type(None)]
        return fit(value, members[0], where) if len(members) == 1 else value
    if kind is Any or (origin is Literal and value in inner):
        return value
    if is_dataclass(kind) and isinstance(value, dict):
        return read(kind, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple) and isinstance(value, list):
        return origin(fit(item, inner[0], f"{where}.{i}") for i, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: fit(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int | float):
        return float(value)
    if origin is None and isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError(f"{where} should be {getattr(kind, '__name__', kind)}, not {json.dumps(value)[:40]}")


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
