"""The three passes over a custom table: find kinds and split, fit vocabularies and means, write.

Memory is bounded: only the vocabularies grow with the data, and 9 bytes per row to draw a random
split and 17 to sort by time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import rich.table
from rich import box
from rich.progress import Progress
from rich.text import Text

from mtnrec.arrays import BoolArray, Float64Array, Int64Array
from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import LARGEST_NUMBER, Manifest
from mtnrec.data.prepared.store import Arrays
from mtnrec.data.prepared.vocabulary import TextCounts, TextVocabulary
from mtnrec.data.prepared.writer import Writer
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.column import (
    MOST_CATEGORIES,
    Moments,
    Profile,
    to_labels,
    to_numbers,
    to_text,
    to_times,
    transformed,
)
from mtnrec.data.raw.tabular import Chunk, Source
from mtnrec.schema import CategoricalField, Schema

SPLITS = ("train", "test")
_TIMES = {"integer": "an integer", "number": "a number", "date": "a date"}
_INFERRED = {
    "text": ("categorical", "not a number"),
    "boolean": ("categorical", "boolean"),
    "integer": ("numerical", f"more than {MOST_CATEGORIES} distinct integers"),
    "number": ("numerical", "number"),
}
_NEEDS_CLICK = (
    "a conversion needs a click (set data.conversion_without_click=drop to drop and count it)"
)


@dataclass(frozen=True)
class TableSettings:
    """Settings of :class:`~mtnrec.data.table.Table` that the preparation reads.

    Args:
        name: Name of the data set.
        parameters: Recorded settings and identities of the tables.
        named: Columns that each setting names.
    """

    name: str
    parameters: dict[str, Any]
    named: dict[str, list[str]]
    labels: list[str]
    funnel: bool
    categorical: list[str] | None
    numerical: list[str] | None
    group: str | None
    time: str | None
    split: str
    test_share: float
    test_seed: int
    fill: float | str | None
    standardise: bool
    min_count: int
    conversion_without_click: str
    on_error: str


class _Plan(NamedTuple):
    """Kinds of the columns, and which rows of ``train`` are test rows."""

    categorical: list[str]
    numerical: list[str]
    kinds: dict[str, str]
    groups: TextVocabulary
    tests: Callable[[Chunk], BoolArray]


class _Rows(NamedTuple):
    """Valid rows, whose features are not yet encoded; missing numbers are NaN."""

    categorical: list[pl.Series]
    numerical: Float64Array
    arrays: Arrays  # labels and group
    time: npt.NDArray[Any]
    tests: BoolArray
    orphans: int


class _Transforms(NamedTuple):
    """Missing numbers become ``fill``, then ``(value - shift) / scale`` is stored; ``(N,)``."""

    fill: Float64Array
    shift: Float64Array
    scale: Float64Array


class TablePreparation:
    """The three passes over a table."""

    def __init__(
        self, table: TableSettings, sources: dict[str, Source], writer: Writer, progress: Progress
    ) -> None:
        self._table = table
        self._labels = table.labels
        self._sources = sources
        self._writer = writer
        self._progress = progress

    def run(self) -> Manifest:
        table = self._table
        plan = self._plan()
        vocabularies, transforms = self._fit(plan)
        report = self._write(plan, vocabularies, transforms)
        fields = tuple(
            vocabulary.write(self._writer.directory, name)
            for name, vocabulary in zip(plan.categorical, vocabularies, strict=True)
        )
        return self._writer.finish(
            source=table.name,
            parameters=table.parameters,
            schema=Schema(fields, tuple(plan.numerical), tuple(self._labels), table.funnel),
            report=report,
            transforms=self._recorded(plan, transforms),
        )

    def _recorded(self, plan: _Plan, transforms: _Transforms) -> dict[str, dict[str, float]]:
        values = transforms._asdict()
        if not self._table.standardise:
            del values["shift"], values["scale"]
        if self._table.fill is None:
            del values["fill"]
        if not values:
            return {}
        neutral = {"shift": 0.0, "scale": 1.0}
        return {
            name: neutral | {part: float(numbers[column]) for part, numbers in values.items()}
            for column, name in enumerate(plan.numerical)
        }

    def _chunks(
        self, action: str, split: str, columns: list[str], bad_rows: BadRows
    ) -> Iterator[Chunk]:
        source = self._sources[split]
        bar = self._progress.add_task(f"{action} {source.name}:", total=None)
        for chunk in source.chunks(columns, bad_rows):
            yield chunk
            self._progress.advance(bar, chunk.frame.height)

    def _plan(self) -> _Plan:
        """Read to find the kind of each column and draw the split."""
        table, path = self._table, self._sources["train"].path
        features = self._features()
        for source in self._sources.values():
            source.require_columns("the features", features)
        profiles = {name: Profile() for name in [*features, *self._keys()]}
        groups = TextCounts()
        rows = 0
        for split in self._sources if table.group is not None else ("train",):
            names = list(profiles) if split == "train" else self._groups()
            for chunk in self._chunks("inspecting", split, names, BadRows(table.on_error)):
                for name in names:
                    profiles[name].update(chunk.frame[name])
                for name in self._groups():
                    groups.update(to_text(chunk.frame[name]))
                rows += chunk.frame.height if split == "train" else 0
        if table.time is not None and profiles[table.time].kind not in _TIMES:
            raise InputError(
                f"{path}: data.time must be a column of numbers or dates, got {table.time!r}"
            )
        reasons = {name: _kind(path, name, profiles[name], table) for name in features}
        categorical, numerical = (
            [name for name in features if reasons[name][0] == kind]
            for kind in ("categorical", "numerical")
        )
        for name in categorical:
            CategoricalField(name, 1)  # raises on a name that is not a valid file name
        self._show(reasons, rows)
        kinds = {name: profiles[name].kind for name in self._keys()}
        vocabulary = groups.vocabulary()
        return _Plan(categorical, numerical, kinds, vocabulary, self._draw(rows, kinds, vocabulary))

    def _features(self) -> list[str]:
        """Return the columns named as features, and those whose kind is to be inferred."""
        table, source = self._table, self._sources["train"]
        given = [*(table.categorical or []), *(table.numerical or [])]
        if table.categorical is None or table.numerical is None:
            named = {name for names in table.named.values() for name in names}
            given += [name for name in source.columns if name not in named]
        if not given:
            raise InputError(f"{source.path} must have at least one feature column, got none")
        return given

    def _groups(self) -> list[str]:
        return [] if self._table.group is None else [self._table.group]

    def _keys(self) -> list[str]:
        return [*self._groups(), *([] if self._table.time is None else [self._table.time])]

    def _show(self, reasons: dict[str, tuple[str, str]], rows: int) -> None:
        """Print the kind of each column and the reason."""
        table = self._table
        shown = rich.table.Table("column", "kind", "why", box=box.SIMPLE_HEAD, padding=0)
        for key, names in table.named.items():
            if key not in ("data.categorical", "data.numerical"):
                role = key.removeprefix("data.").removesuffix("s").replace("exclude", "left out")
                reasons = reasons | dict.fromkeys(names, (role, key))
        for name in self._sources["train"].columns:
            kind, why = reasons.get(name, ("left out", "categorical and numerical are both given"))
            shown.add_row(Text(name), kind, why)
        kinds = [kind for kind, _ in reasons.values()]
        features = kinds.count("categorical") + kinds.count("numerical")
        width = 4 * features + len(self._labels) + 8 * len(self._groups())
        console = self._progress.console
        console.print(shown)
        console.print(f"{rows:,} rows to write, about {rows * width / 1e6:,.1f} MB of disk")

    def _draw(
        self, rows: int, kinds: dict[str, str], groups: TextVocabulary
    ) -> Callable[[Chunk], BoolArray]:
        """Return a function that marks the test rows of a chunk of ``train``."""
        table = self._table
        if "test" in self._sources:
            return lambda chunk: np.zeros(chunk.frame.height, np.bool_)
        rng = np.random.default_rng(table.test_seed)
        if table.split == "grouped":
            count = groups.size - 1
            drawn = rng.permutation(count) < round(table.test_share * count)
            tests = np.concatenate([[False], drawn])  # index 0: no group, refused later
            group = str(table.group)
            return lambda chunk: tests[groups.encode(to_text(chunk.frame[group]))]
        order = rng.permutation(rows) if table.split == "random" else self._latest_first(kinds)
        tests = np.zeros(rows, np.bool_)
        tests[order[: round(table.test_share * rows)]] = True
        return lambda chunk: tests[chunk.first : chunk.first + chunk.frame.height]

    def _latest_first(self, kinds: dict[str, str]) -> Int64Array:
        time, bad_rows = str(self._table.time), BadRows(self._table.on_error)
        times = [
            to_times(chunk.frame[time], kinds[time]).fill_null(0).to_numpy()
            for chunk in self._chunks("sorting", "train", [time], bad_rows)
        ]
        return np.concatenate(times).argsort(kind="stable")[::-1]

    def _fit(self, plan: _Plan) -> tuple[list[TextVocabulary], _Transforms]:
        """Read to fit the vocabularies and means to the training rows."""
        table = self._table
        counts = [TextCounts() for _ in plan.categorical]
        moments = Moments(len(plan.numerical))
        for rows in self._rows("fitting to", "train", plan, BadRows(table.on_error)):
            for values, column in zip(counts, rows.categorical, strict=True):
                values.update(column.filter(~rows.tests))
            numerical = rows.numerical[~rows.tests]
            if isinstance(table.fill, int | float):
                numerical = np.where(np.isnan(numerical), table.fill, numerical)
            moments.update(numerical)
        moments.finish()
        vocabularies = [values.vocabulary(min_count=table.min_count) for values in counts]
        none = np.zeros(len(plan.numerical))
        return vocabularies, _Transforms(
            moments.mean if table.fill == "mean" else none + float(table.fill or 0),
            moments.mean if table.standardise else none,
            moments.scale if table.standardise else none + 1,
        )

    def _write(
        self, plan: _Plan, vocabularies: list[TextVocabulary], transforms: _Transforms
    ) -> dict[str, int]:
        """Read and write the rows; return the counts."""
        report: dict[str, int] = {}
        times: dict[str, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
        for source in self._sources:
            bad_rows, orphans = BadRows(self._table.on_error), 0
            for rows in self._rows("writing", source, plan, bad_rows):
                indices = map(TextVocabulary.encode, vocabularies, rows.categorical)
                arrays = rows.arrays | {
                    "categorical": _side_by_side(list(indices), np.ones_like(rows.tests)),
                    "numerical": transformed(rows.numerical, *transforms),
                }
                for split, keep in (("train", ~rows.tests), ("test", rows.tests)):
                    self._writer.append(split, {stem: a[keep] for stem, a in arrays.items()})
                    self._count_missing(split, plan, rows, keep)
                    times[split].append(rows.time[keep])
                orphans += rows.orphans
            bad_rows.warn()
            report |= self._counted(source, bad_rows.count, orphans)
        if self._table.time is not None:
            self._writer.close_arrays()
            for split, parts in times.items():
                self._writer.permute(split, np.concatenate(parts).argsort(kind="stable"))
        return report

    def _count_missing(self, split: str, plan: _Plan, rows: _Rows, keep: BoolArray) -> None:
        missing = self._writer.missing[split]
        for name, column in zip(plan.categorical, rows.categorical, strict=True):
            missing[name] += column.filter(keep).null_count()
        for name, lacking in zip(plan.numerical, np.isnan(rows.numerical).T, strict=True):
            missing[name] += int(np.count_nonzero(lacking & keep))

    def _counted(self, source: str, skipped: int, orphans: int) -> dict[str, int]:
        table = self._table
        counted = {}
        if table.on_error == "skip":
            counted[f"{source}_rows_skipped"] = skipped
        if table.funnel and table.conversion_without_click == "drop":
            counted[f"{source}_conversions_without_click"] = orphans
        return counted

    def _rows(self, action: str, source: str, plan: _Plan, bad_rows: BadRows) -> Iterator[_Rows]:
        columns = [*plan.categorical, *plan.numerical, *self._labels, *self._keys()]
        for chunk in self._chunks(action, source, columns, bad_rows):
            rules = _Rules(chunk, bad_rows)
            labels = [rules.read_label(name) for name in self._labels]
            numerical = [
                rules.read_number(name, required=self._table.fill is None)
                for name in plan.numerical
            ]
            group, time = self._read_keys(chunk, plan, rules)
            orphan = np.zeros(chunk.frame.height, np.bool_)
            if self._table.funnel:
                orphan = labels[1] > labels[0]
                if self._table.conversion_without_click == "refuse":
                    rules.require(self._labels[1], ~orphan, _NEEDS_CLICK)
            keep = ~(rules.broken | orphan)
            tests = plan.tests(chunk) if source == "train" else np.ones_like(keep)
            yield _Rows(
                [to_text(chunk.frame[name]).filter(keep) for name in plan.categorical],
                _side_by_side(numerical, keep),
                {stem: array[keep] for stem, array in group.items()}
                | {"labels": np.stack(labels, axis=1)[keep]},
                time[keep],
                tests[keep],
                int(np.count_nonzero(orphan & ~rules.broken)),
            )

    def _read_keys(
        self, chunk: Chunk, plan: _Plan, rules: "_Rules"
    ) -> tuple[Arrays, npt.NDArray[Any]]:
        arrays: Arrays = {}
        for name in self._groups():
            column = chunk.frame[name]
            if plan.kinds[name] == "integer":
                read = column.cast(pl.Int64, strict=False)
            else:
                read = pl.Series(plan.groups.encode(to_text(column)), dtype=pl.Int64)
                read = read.set(column.is_null(), None)
            rule = "a group must be given and, if it is an integer, fit in 64 bits"
            arrays["group"] = rules.read(name, read, rule)
        if self._table.time is None:
            return arrays, np.zeros(chunk.frame.height)
        name, kind = self._table.time, plan.kinds[self._table.time]
        read = to_times(chunk.frame[name], kind)
        return arrays, rules.read(name, read, f"expected {_TIMES[kind]}")


class _Rules:
    """Reads the columns of a chunk and marks the rows that break a rule."""

    def __init__(self, chunk: Chunk, bad_rows: BadRows) -> None:
        self._chunk = chunk
        self._bad_rows = bad_rows
        self.broken = np.zeros(chunk.frame.height, np.bool_)

    def require(self, name: str, holds: BoolArray, rule: str) -> None:
        broken = ~(holds | self.broken)
        for row in np.flatnonzero(broken):
            value = self._chunk.frame[name][int(row)]
            got = "nothing" if value is None else repr(value)[:40]
            self._bad_rows.add(f"{self._chunk.place(int(row))}, column {name!r}", rule, got)
        self.broken |= broken

    def read(self, name: str, read: pl.Series, rule: str) -> npt.NDArray[Any]:
        """Return a column as an array after requiring that no cell is null."""
        self.require(name, read.is_not_null().to_numpy(), rule)
        return read.fill_null(0).to_numpy()

    def read_label(self, name: str) -> npt.NDArray[Any]:
        read = to_labels(self._chunk.frame[name])
        return self.read(name, read, "a label must be 0 or 1 (or false, true)")

    def read_number(self, name: str, *, required: bool) -> Float64Array:
        """Read a numerical feature; missing numbers are NaN."""
        raw = self._chunk.frame[name]
        read = to_numbers(raw)
        self.require(name, (read.is_not_null() | raw.is_null()).to_numpy(), "expected a number")
        values = read.fill_null(np.nan).to_numpy()
        self.require(name, ~(np.abs(values) > LARGEST_NUMBER), "a number must be finite in 32 bits")
        if required:
            rule = "a number must be given (set data.fill=NUMBER or data.fill=mean to fill it in)"
            self.require(name, ~np.isnan(values), rule)
        return values


def _side_by_side(columns: list[npt.NDArray[Any]], keep: BoolArray) -> npt.NDArray[Any]:
    """Stack the kept rows of columns; there may be no columns."""
    empty = np.empty((np.count_nonzero(keep), 0), np.int32)
    return np.column_stack([empty, *(column[keep] for column in columns)])


def _kind(path: Path | str, name: str, profile: Profile, table: TableSettings) -> tuple[str, str]:
    """Return the kind of a feature and the reason."""
    if profile.kind == "empty":
        raise InputError(
            f"{path}: the column {name!r} must have a value in some row, got none. Set "
            "data.exclude to leave it out."
        )
    for kind in ("categorical", "numerical"):
        if name in (getattr(table, kind) or []):
            return kind, "given"
    if profile.kind == "date":
        raise InputError(
            f"{path}: the kind of the column {name!r} cannot be inferred, got dates. Set "
            "data.exclude to leave it out, name it in data.time or data.categorical, or convert it "
            "to numbers."
        )
    if profile.kind == "integer" and profile.distinct is not None:
        return "categorical", f"{profile.distinct} distinct integers"
    return _INFERRED[profile.kind]
