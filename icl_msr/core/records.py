"""What was measured: one number a record, how records are laid out for people, and both as a run's `results.json`.

An evaluation makes records and says in a `Layout` beside them which table and which plot they stand in. The report, the
dashboards and a sweeper read them. Nobody else has to know a new kind of record.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from icl_msr.core.errors import UserError

Read = TypeVar("Read")
Unit = Literal["fraction", "points", "count", "number"]
"""A fraction is shown in per cent; points are differences of fractions in per cent."""
TRAINED, UNTRAINED = "trained", "untrained"
"""The encoder that is evaluated, and the one that it is compared with."""
CHANCE = "chance"
"""In place of a split: the accuracy of guessing."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What names the classes of images."""

    family: str
    """`linear` and `knn` on frozen features, `finetune`, or `head`, which the encoder came with."""
    preset: str = ""
    """How it is fitted, as `dino`; empty for the usual way."""
    fraction: float = 1.0
    """Of the labels that it is fitted with."""

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f"{100 * self.fraction:g}%"
        return "-".join(filter(None, (self.family, self.preset, part)))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number, and all that says what it is a number of."""

    kind: str
    """Records of one kind share a `Layout`."""
    metric: str = "accuracy"
    value: float | None
    """None where the measure has no value, as the rank of features that are all zero."""
    low: float | None = None
    high: float | None = None
    """The 95 % interval."""
    n: int | None = None
    """Images."""
    unit: Unit = "fraction"
    better: Literal["more", "less", "neither"] = field(default="more", compare=False)
    """Which values are good ones; `less` is nearer to zero."""
    encoder: str = TRAINED
    classifier: Classifier | None = None
    fitted_on: str = ""
    """`train` or `balanced`; `stimuli` for what is read inside them, `own` for the classifier of the encoder."""
    split: str = ""
    minus: str = ""
    """Of a difference: the split that is subtracted from `split`, or `CHANCE`."""
    factors: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)
    """What else tells this record from others of its kind, as `{"corruption": "fog", "severity": 3}`."""
    note: str = ""

    def __post_init__(self) -> None:
        if taken := _OWN & self.factors.keys():
            raise ValueError(f"a record has a field {min(taken)} of its own, so no factor can have this name")

    @property
    def splits(self) -> str:
        """`mixed_rand`, or `mixed_same - mixed_rand` for a difference."""
        return f"{self.split} - {self.minus}" if self.minus else self.split

    @property
    def name(self) -> str:
        """What a user types to name this number, as `linear/balanced/mixed_rand`; the encoder is no part of it."""
        usual = self.kind in (ACCURACY.kind, GAP.kind)
        kind, metric = "" if usual else self.kind, "" if self.metric == "accuracy" else self.metric
        parts = (kind, metric, self.classifier or "", self.fitted_on, self.splits, *self.factors.values())
        return "/".join(str(part) for part in parts if part != "")

    @property
    def identity(self) -> Self:
        """The record without its number: equal for the same measure of two runs."""
        return replace(self, value=None, low=None, high=None, n=None, note="")

    @property
    def shown(self) -> float | None:
        """The value as people read it: fractions in per cent."""
        return self.scaled(self.value)

    def scaled(self, value: float | None) -> float | None:
        """A value of this unit as people read it."""
        return 100 * value if value is not None and self.unit == "fraction" else value

    def told(self, by: str) -> Any:
        """The value of a field or factor, or of `splits`; None where it has none. A classifier is told by its name."""
        value = getattr(self, by) if by in _OWN or by == "splits" else self.factors.get(by)
        return None if value in (None, "") else str(value) if by == "classifier" else value

    def row(self) -> dict[str, Any]:
        """The record as a flat row: factors and the parts of the classifier are columns; what is empty is left out."""
        row: dict[str, Any] = {"encoder": self.encoder, **({} if self.classifier is None else vars(self.classifier))}
        row |= {"fitted_on": self.fitted_on, "split": self.split, "minus": self.minus, **self.factors}
        row |= {"metric": self.metric, "value": self.value, "low": self.low, "high": self.high, "n": self.n}
        row |= {"unit": self.unit, "better": self.better, "note": self.note}
        usual = {"fraction": 1, "better": "more"}
        return {k: v for k, v in row.items() if k == "value" or (v not in (None, "") and (k, v) not in usual.items())}

    @classmethod
    def read(cls, kind: str, row: Mapping[str, Any], where: str) -> Self:
        """The record of a `row`.

        Raises:
            ValueError: a value is none of its type.
        """
        parts = [f.name for f in fields(Classifier)]
        classifier = {key: row[key] for key in parts if key in row} or None
        known = {key: value for key, value in row.items() if key in _OWN}
        factors = {key: value for key, value in row.items() if key not in _OWN and key not in parts}
        return read(cls, {**known, "kind": kind, "classifier": classifier, "factors": factors}, where)


_OWN = frozenset(f.name for f in fields(Measurement)) - {"factors"}


@dataclass(frozen=True, kw_only=True)
class ByClass:
    """Where one classifier is right on a test split, and what it takes for what."""

    encoder: str
    classifier: Classifier
    fitted_on: str
    split: str
    accuracies: list[float | None]
    """In [0, 1], in the order of the classes; None of a class without images."""
    classes: list[str] | None = None
    """The names of the classes; None for those of the data set, in its order."""
    confused: list[list[Any]] = field(default_factory=list)
    """[true class, predicted class, images]: the ten largest confusions."""
    confusion: list[list[int]] | None = None
    """Images of each true class (rows) taken for each class (columns); None where there are too many classes."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot of records: one panel, one place on the axis and one series for each value of what tells them apart."""

    axis: str
    """A field or factor."""
    series: tuple[str, ...]
    panel: str = ""
    where: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the records that are drawn have, as `{"metric": "excess"}`; all records by default."""
    shape: Literal["dots", "lines"] = "dots"
    """Lines are for an axis of numbers."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the records of one kind are shown to people."""

    kind: str
    title: str
    rows: tuple[str, ...]
    """The fields and factors that tell the lines of the table apart."""
    columns: tuple[str, ...] = ("metric",)
    """Those that tell the columns apart."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Words for people, in place of a name or a value."""
    details: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What is said beneath a name or a value, smaller."""
    about: str = ""
    """A paragraph before the table."""
    count: str = ""
    """The heading of the column with the number of images; empty: none."""
    notes: str = ""
    """The heading of the column with the notes; empty: none."""
    heat: bool = False
    """Whether cells are coloured by their value."""
    folded: bool = False
    """Whether the page hides the table until it is asked for."""
    chart: Chart | None = None


ACCURACY = Layout(
    kind="accuracy",
    title="Accuracy, %",
    rows=("fitted_on", "classifier", "encoder"),
    columns=("split",),
    labels={"fitted_on": "fitted on", "own": "data of its own"},
    about="Per cent, with 95 % intervals over images. Fitted on the training set, a classifier may use the background "
    "as far as it agrees with the class there; fitted on a balanced split it cannot, and shows what of the object is "
    "in the features.",
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
        ("fg", "crop"): "gained by cropping to the object and not anywhere",
        ("only_bg", CHANCE): "above chance from the background alone",
    }
)
"""What happens to the image between two splits."""
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
    """All records of an encoder, or of one beside another."""

    measurements: list[Measurement] = field(default_factory=list)
    by_class: list[ByClass] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    """By kind; records of a kind without one are in no table."""

    def add(self, layout: Layout, *records: Measurement) -> None:
        """Put records and their layout behind what is here."""
        self.layouts[layout.kind] = layout
        self.measurements += records

    def join(self, other: "Records") -> None:
        """Put what another evaluation of the same encoders found behind what is here; a record that is here stays."""
        self.layouts = self.layouts | other.layouts | self.layouts
        self.measurements = list(dict.fromkeys([*self.measurements, *other.measurements]))
        self.by_class += [record for record in other.by_class if record not in self.by_class]

    def where(self, kind: str, **known: Any) -> list[Measurement]:
        """Records of one kind whose fields and factors have the values given; a classifier is given by its name."""
        return [
            record
            for record in self.measurements
            if record.kind == kind and all(record.told(by) == value for by, value in known.items())
        ]

    def find(self, kind: str, **known: Any) -> Measurement | None:
        """The first such record, where there is one."""
        return next(iter(self.where(kind, **known)), None)

    def kinds(self) -> list[str]:
        """The kinds that there are, those with a layout first and in the order of the layouts."""
        there = dict.fromkeys(record.kind for record in self.measurements)
        return [kind for kind in dict.fromkeys([*self.layouts, *there]) if kind in there]

    def findings(self) -> list[Measurement]:
        """The records that say what was found: no counts, and no kind that a page hides until it is asked for."""
        hidden = {layout.kind for layout in self.layouts.values() if layout.folded}
        return [r for r in self.measurements if r.value is not None and r.unit != "count" and r.kind not in hidden]

    def numbers(self) -> dict[str, float]:
        """The findings on the trained encoder by the name that a user types: what a sweeper and a dashboard know."""
        return {r.name: r.value for r in self.findings() if r.encoder == TRAINED and r.value is not None}

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Flat rows by kind."""
        return {kind: [record.row() for record in self.where(kind)] for kind in self.kinds()}

    def to_json(self) -> dict[str, Any]:
        """Plain data; see `from_json`."""
        return {
            "records": self.rows(),
            "by_class": [asdict(record) for record in self.by_class],
            "layouts": [asdict(layout) for layout in self.layouts.values()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Records":
        """What `to_json` made.

        Raises:
            ValueError: it is damaged; the message says where.
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
    """`results.json`: what came out of a run or an evaluation. What a page can do without may be missing."""

    seed: int
    name: str = "run"
    choices: Mapping[str, str | None] = field(default_factory=dict)
    evaluation_seed: int | None = None
    encoder: str = ""
    """Where the encoder came from, if not from this run."""
    train_on: str | None = None
    classes: list[str] = field(default_factory=list)
    chance: float | None = None
    derived: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    wall_time_s: float | None = None
    images_per_second: float | None = None
    peak_memory_mb: float | None = None
    metric: dict[str, Any] = field(default_factory=dict)
    """`name` and `value` of what a sweeper maximises."""
    final: dict[str, float | None] = field(default_factory=dict)
    """The last value of everything that was logged."""
    records: Records = field(default_factory=Records)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "records"}
        return about | self.records.to_json()

    def numbers(self) -> dict[str, float]:
        """Every number by name: logged values, those of `Records.numbers`, the cost, and the metric."""
        cost = {name: getattr(self, name) for name in ("images_per_second", "peak_memory_mb", "wall_time_s")}
        found = {**self.final, **self.records.numbers(), **cost, "metric": self.metric.get("value")}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def load(cls, folder: Path) -> "Outcome":
        """Read `results.json` of a folder.

        Raises:
            UserError: the file is missing or damaged.
        """
        file = folder / "results.json"
        try:
            content = json.loads(file.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it holds no mapping")
            found = read(cls, {key: value for key, value in content.items() if key != "records"}, "")
            found.records = Records.from_json(content)
            return found
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no results.json: the run failed or has not ended; give the folder of a finished run."
            ) from None
        except (ValueError, OSError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); repeat the run or remove it from the folders given."
            ) from None


def chosen_metric(name: str, outcome: Outcome) -> tuple[str, float]:
    """Name and value of what a sweeper maximises; NaN where that was not measured.

    `auto` is the accuracy that rewards the background least: the linear probe before other classifiers, fitted on the
    balanced split before train, on `mixed_rand` before other splits; without an evaluation, the online kNN.
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
    """A dataclass of plain data; keys that it does not know are left out.

    Raises:
        ValueError: a value is missing or none of its type.
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
    """Plain data as a value of a type: dataclasses of mappings, tuples of lists.

    Raises:
        ValueError: it is none.
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
