"""The three passes over a custom table: find kinds and split, fit vocabularies and means, write.

Memory is bounded: only the vocabularies grow with the data, and 9 bytes per row to draw a random
split and 17 to sort by time.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import rich.table
from rich import box
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from mtnrec.arrays import BoolArray, Float64Array, Int64Array
from mtnrec.checks import InputError, format_names
from mtnrec.data.prepared.manifest import LARGEST_NUMBER, Manifest
from mtnrec.data.prepared.store import Arrays
from mtnrec.data.prepared.vocabulary import TextCounts, TextVocabulary
from mtnrec.data.prepared.writer import Writer, write_prepared
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.column import (
    Moments,
    Profile,
    to_bags,
    to_labels,
    to_numbers,
    to_text,
    to_times,
    transformed,
)
from mtnrec.data.raw.tabular import Chunk, RowRules, Source
from mtnrec.schema import CategoricalField, Schema

_logger = logging.getLogger(__name__)

_DATES = "YYYY-MM-DD or YYYY-MM-DD HH:MM:SS, with Z or +01:00 if it has a zone"
_TIMES = {"integer": "an integer", "number": "a number", "date": f"a date ({_DATES})"}
_INFERRED = {
    "list": ("multi-valued", "lists"),
    "text": ("categorical", "text"),
    "boolean": ("categorical", "boolean"),
    "integer": ("categorical", "whole numbers; data.numerical for a measurement"),
    "number": ("numerical", "numbers with a fraction"),
}
WEIGHTS = "_weights"  # ends the name of the column of weights of a multi-valued field
_MOST_VALUES = 20  # of a label in a chunk
_NEEDS_CLICK = (
    "a conversion needs a click, each label of a funnel the one before it (set "
    "data.conversion_without_click=drop to drop and count it, or =clear to count it as none)"
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
    funnel: bool = False
    categorical: list[str] | None = None
    numerical: list[str] | None = None
    group: str | None = None
    time: str | None = None
    split: str = "random"
    test_share: float = 0.2
    test_seed: int = 0
    fill: float | str | None = None
    standardise: bool = True
    positive: Any = None
    min_count: int = 1
    conversion_without_click: str = "refuse"
    on_error: str = "refuse"


class _Plan(NamedTuple):
    """Kinds of the columns, and which rows of ``train`` are test rows."""

    categorical: list[str]
    numerical: list[str]
    multivalued: list[str]
    kinds: dict[str, str]
    groups: TextVocabulary
    tests: Callable[[Chunk], BoolArray]


class _Bags(NamedTuple):
    """Bags of a multi-valued field, not yet encoded."""

    lengths: Int64Array
    items: pl.Series
    weights: Float64Array

    def filter(self, keep: BoolArray) -> "_Bags":
        """Return the bags of the kept rows."""
        items = np.repeat(keep, self.lengths)
        return _Bags(self.lengths[keep], self.items.filter(items), self.weights[items])


class _Rows(NamedTuple):
    """Valid rows, whose features are not yet encoded; missing numbers are NaN."""

    categorical: list[pl.Series]
    numerical: Float64Array
    bags: list[_Bags]
    arrays: Arrays  # labels and group
    time: npt.NDArray[Any]
    tests: BoolArray
    orphans: int


class _Transforms(NamedTuple):
    """Missing numbers become ``fill``, then ``(value - shift) / scale`` is stored; ``(N,)``."""

    fill: Float64Array
    shift: Float64Array
    scale: Float64Array


def prepare_tables(
    directory: Path, settings: TableSettings, sources: Mapping[str, Source]
) -> Manifest:
    """Read tables and write the prepared data set.

    Args:
        directory: Folder of the prepared data set.
        settings: Settings of the preparation.
        sources: Tables by split: ``train``, and those of test sets. Without ``test``, its rows are
            a part of ``train``.

    Raises:
        InputError: If a setting or a table breaks a rule.
    """
    splits = tuple(dict.fromkeys(["train", "test", *sources]))
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,} rows"))
    with (
        write_prepared(directory, splits) as writer,
        Progress(*columns, TimeElapsedColumn()) as progress,
    ):
        return TablePreparation(settings, sources, writer, progress).run()


class TablePreparation:
    """The three passes over a table."""

    def __init__(
        self,
        table: TableSettings,
        sources: Mapping[str, Source],
        writer: Writer,
        progress: Progress,
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
        names = [*plan.categorical, *plan.multivalued]
        fields = tuple(
            vocabulary.write(self._writer.directory, name)
            for name, vocabulary in zip(names, vocabularies, strict=True)
        )
        count = len(plan.categorical)
        return self._writer.finish(
            source=table.name,
            parameters=table.parameters,
            schema=Schema(
                fields[:count],
                tuple(plan.numerical),
                tuple(self._labels),
                table.funnel,
                multivalued=fields[count:],
            ),
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
        self,
        action: str,
        split: str,
        columns: list[str],
        bad_rows: BadRows,
        lists: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        """Read columns of a split; those named in ``lists`` may hold lists."""
        source = self._sources[split]
        bar = self._progress.add_task(f"{action} {source.name}:", total=None)
        for chunk in source.chunks(columns, bad_rows, lists=lists):
            yield chunk
            self._progress.advance(bar, chunk.frame.height)

    def _plan(self) -> _Plan:
        """Read to find the kind of each column and draw the split."""
        table, path = self._table, self._sources["train"].path
        features = self._features()
        for source in self._sources.values():
            source.require_columns("the features", features)
        profiles, groups, rows = self._inspect(features)
        if table.time is not None and profiles[table.time].kind not in _TIMES:
            _refuse_word(table.time, profiles[table.time])
            raise InputError(
                f"{path}: data.time must be a column of numbers or dates, got {table.time!r}"
            )
        weights = {name + WEIGHTS for name in features if profiles[name].kind == "list"}
        features = [name for name in features if name not in weights]
        reasons = {name: _kind(path, name, profiles[name], table) for name in features}
        categorical, numerical, multivalued = (
            [name for name in features if reasons[name][0] == kind]
            for kind in ("categorical", "numerical", "multi-valued")
        )
        for name in (*categorical, *multivalued):
            CategoricalField(name, 1)  # raises on a name that is not a valid file name
        self._show(reasons, rows)
        kinds = {name: profiles[name].kind for name in self._keys()}
        for name in self._groups():
            _refuse_inexact(path, name, profiles[name])
            if kinds[name] == "integer" and groups.values.cast(pl.Int64, strict=False).has_nulls():
                kinds[name] = "text"  # too large for 64 bits: numbered like texts
        tests = self._draw(rows, kinds, groups)
        return _Plan(categorical, numerical, multivalued, kinds, groups, tests)

    def _inspect(self, features: list[str]) -> tuple[dict[str, Profile], TextVocabulary, int]:
        """Read the profiles of the columns, the groups of all tables and the count of rows."""
        table = self._table
        profiles = {name: Profile() for name in [*features, *self._keys()]}
        values: dict[str, set[str]] = {label: set() for label in self._labels}
        groups = TextCounts()
        rows = 0
        for split in self._sources if table.group is not None else ("train",):
            names = list(profiles) if split == "train" else self._groups()
            labels = self._labels if split == "train" else []
            not_lists = {*(table.numerical or []), *self._keys()}
            chunks = self._chunks(
                "inspecting",
                split,
                [*names, *labels],
                BadRows(table.on_error),
                lists=[name for name in names if name not in not_lists],
            )
            for chunk in chunks:
                for name in names:
                    profiles[name].update(chunk.frame[name], chunk.place)
                for name in self._groups():
                    groups.update(to_text(chunk.frame[name]))
                for name in labels:
                    found = to_text(chunk.frame[name]).drop_nulls().unique()
                    values[name].update(found.head(_MOST_VALUES))
                rows += chunk.frame.height if split == "train" else 0
        self._check_labels(values)
        return profiles, groups.vocabulary(), rows

    def _check_labels(self, values: dict[str, set[str]]) -> None:
        """Refuse a third value under a single positive one, which may be misspelled."""
        positive = positive_texts(self._table.positive)
        if positive is None or isinstance(self._table.positive, list | tuple):
            return
        for label, found in values.items():
            others = sorted(value for value in found if value.lower() not in positive)
            if len(others) > 1:
                raise InputError(
                    f"the label {label!r} must have one value besides "
                    f"data.positive={self._table.positive}, got {format_names(others)}. Correct "
                    "it, or give data.positive as a list, [VALUE], to make all others negative."
                )

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
                # A group that is a feature as well is shown as the feature.
                reasons = dict.fromkeys(names, (role, key)) | reasons
        source = self._sources["train"]
        lists = [name for name, (kind, _) in reasons.items() if kind == "multi-valued"]
        reasons |= {
            name + WEIGHTS: ("weights", f"of {name}")
            for name in lists
            if name + WEIGHTS in source.columns
        }
        reasons = dict.fromkeys(source.index, ("left out", "the index of pandas")) | reasons
        for name in (*source.columns, *source.index):
            kind, why = reasons.get(name, ("left out", "categorical and numerical are both given"))
            shown.add_row(Text(name), kind, Text(why))
        kinds = [kind for kind, _ in reasons.values()]
        features = kinds.count("categorical") + kinds.count("numerical")
        width = 4 * features + len(self._labels) + 8 * len(self._groups())
        console = self._progress.console
        console.print(shown)
        for of_split in self._sources.values():
            if of_split.form:
                console.print(of_split.form, markup=False)
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
        counts = [TextCounts() for _ in (*plan.categorical, *plan.multivalued)]
        moments = Moments(len(plan.numerical))
        for rows in self._rows("fitting to", "train", plan, BadRows(table.on_error)):
            columns = [column.filter(~rows.tests) for column in rows.categorical]
            columns += [bags.filter(~rows.tests).items for bags in rows.bags]
            for values, column in zip(counts, columns, strict=True):
                values.update(column)
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
        count = len(plan.categorical)
        unseen = set(plan.categorical)  # fields of which no test value is known
        times: dict[str, list[npt.NDArray[Any]]] = {
            s: [] for s in ("train", "test", *self._sources)
        }
        for source in self._sources:
            bad_rows, orphans = BadRows(self._table.on_error), 0
            target = "test" if source == "train" else source  # of rows that are not for training
            for rows in self._rows("writing", source, plan, bad_rows, transforms):
                indices = list(map(TextVocabulary.encode, vocabularies[:count], rows.categorical))
                arrays = rows.arrays | {
                    "categorical": _side_by_side(indices, np.ones_like(rows.tests)),
                    "numerical": transformed(rows.numerical, *transforms),
                }
                for split, keep in (("train", ~rows.tests), (target, rows.tests)):
                    self._append(split, arrays, rows, keep, vocabularies[count:], plan)
                    self._count_missing(split, plan, rows, keep)
                    times[split].append(rows.time[keep])
                known = zip(plan.categorical, indices, strict=True)
                if target == "test":
                    unseen -= {name for name, index in known if index[rows.tests].any()}
                orphans += rows.orphans
            bad_rows.warn()
            report |= self._counted(source, bad_rows.count, orphans)
        if self._table.time is not None:
            self._writer.close_arrays()
            for split, parts in times.items():
                self._writer.permute(split, np.concatenate(parts).argsort(kind="stable"))
        missing, rows_of_test = self._writer.missing["test"], self._writer.rows("test")
        for name in sorted(name for name in unseen if missing[name] < rows_of_test):
            _logger.warning("no test value of the column %r occurs in the training rows", name)
        return report

    def _append(
        self,
        split: str,
        arrays: Arrays,
        rows: _Rows,
        keep: BoolArray,
        vocabularies: list[TextVocabulary],
        plan: _Plan,
    ) -> None:
        """Append the kept rows; each has bags of its own."""
        kept = {stem: array[keep] for stem, array in arrays.items()}
        if plan.multivalued:
            own = self._writer.rows(split) + np.arange(np.count_nonzero(keep))
            kept["bag"] = np.repeat(own[:, None], len(plan.multivalued), axis=1)
        self._writer.append(split, kept)
        for name, vocabulary, bags in zip(plan.multivalued, vocabularies, rows.bags, strict=True):
            lengths, items, weights = bags.filter(keep)
            tokens = vocabulary.encode(items)
            self._writer.append_bags(split, name, lengths, tokens, weights.astype(np.float32))

    def _count_missing(self, split: str, plan: _Plan, rows: _Rows, keep: BoolArray) -> None:
        missing = self._writer.missing[split]
        for name, column in zip(plan.categorical, rows.categorical, strict=True):
            missing[name] += column.filter(keep).null_count()
        for name, lacking in zip(plan.numerical, np.isnan(rows.numerical).T, strict=True):
            missing[name] += int(np.count_nonzero(lacking & keep))
        for name, bags in zip(plan.multivalued, rows.bags, strict=True):
            missing[name] += int(np.count_nonzero((bags.lengths == 0) & keep))

    def _counted(self, source: str, skipped: int, orphans: int) -> dict[str, int]:
        table = self._table
        counted = {}
        if table.on_error == "skip":
            counted[f"{source}_rows_skipped"] = skipped
        if table.funnel and table.conversion_without_click != "refuse":
            counted[f"{source}_conversions_without_click"] = orphans
        return counted

    def _rows(
        self,
        action: str,
        source: str,
        plan: _Plan,
        bad_rows: BadRows,
        transforms: _Transforms | None = None,
    ) -> Iterator[_Rows]:
        weights = [name + WEIGHTS for name in plan.multivalued]
        weights = [name for name in weights if name in self._sources[source].columns]
        keys = [name for name in self._keys() if name not in plan.categorical]
        columns = [*plan.categorical, *plan.numerical, *self._labels, *keys]
        lists = [*plan.multivalued, *weights]
        positive = positive_texts(self._table.positive)
        for chunk in self._chunks(action, source, [*columns, *lists], bad_rows, lists):
            rules = _Rules(chunk, bad_rows)
            labels = [rules.read_label(name, positive) for name in self._labels]
            numerical = [
                rules.read_number(name, required=self._table.fill is None)
                for name in plan.numerical
            ]
            if transforms is not None:
                rules.require_stored(plan.numerical, numerical, transforms)
            bags = [rules.read_bags(name, weights) for name in plan.multivalued]
            group, time = self._read_keys(chunk, plan, rules)
            orphan = np.zeros(chunk.frame.height, np.bool_)
            remedy = self._table.conversion_without_click
            if self._table.funnel:
                for name, before, label in zip(self._labels[1:], labels, labels[1:], strict=False):
                    orphan |= label > before
                    if remedy == "refuse":
                        rules.require(name, label <= before, _NEEDS_CLICK)
            if self._table.funnel and remedy == "clear":
                labels = list(accumulate(labels, np.minimum))
            keep = ~rules.broken if remedy == "clear" else ~(rules.broken | orphan)
            tests = plan.tests(chunk) if source == "train" else np.ones_like(keep)
            yield _Rows(
                [to_text(chunk.frame[name]).filter(keep) for name in plan.categorical],
                _side_by_side(numerical, keep),
                [of_field.filter(keep) for of_field in bags],
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
                read = to_text(column).cast(pl.Int64, strict=False)
            else:
                text = to_text(column)
                read = pl.Series(plan.groups.encode(text), dtype=pl.Int64)
                read = read.set(text.is_null(), None)
            rule = "a group must be given and, if it is an integer, fit in 64 bits"
            arrays["group"] = rules.read(name, read, rule)
        if self._table.time is None:
            return arrays, np.zeros(chunk.frame.height)
        name, kind = self._table.time, plan.kinds[self._table.time]
        read = to_times(chunk.frame[name], kind)
        return arrays, rules.read(name, read, f"expected {_TIMES[kind]}")


class _Rules(RowRules):
    """Reads the columns of a chunk and marks the rows that break a rule."""

    def read(self, name: str, read: pl.Series, rule: str) -> npt.NDArray[Any]:
        """Return a column as an array after requiring that no cell is null."""
        self.require(name, read.is_not_null().to_numpy(), rule)
        return read.fill_null(0).to_numpy()

    def read_label(self, name: str, positive: list[str] | None) -> npt.NDArray[Any]:
        read = to_labels(self._chunk.frame[name], positive)
        rule = "a label must be 0 or 1 (or false, true; set data.positive=VALUE for others)"
        return self.read(name, read, rule if positive is None else "a label must be given")

    def read_bags(self, name: str, weights: Collection[str]) -> _Bags:
        """Read a multi-valued feature; a missing list is empty, and weights are 1 by default."""
        lengths, raw = to_bags(self._chunk.frame[name])
        items, numbers = to_text(raw), np.ones(len(raw))
        row = np.repeat(np.arange(len(lengths)), lengths)
        bad = np.bincount(row[items.is_null().to_numpy()], minlength=len(lengths)) > 0
        self.require(name, ~bad, "a list must not hold missing values")
        if name + WEIGHTS in weights:
            others, raw = to_bags(self._chunk.frame[name + WEIGHTS])
            fits = others == lengths
            self.require(name + WEIGHTS, fits, f"expected as many weights as {name}")
            given = to_numbers(raw).fill_null(np.nan).to_numpy()
            numbers[np.repeat(fits, lengths)] = given[np.repeat(fits, others)]
            wrong = ~(np.abs(numbers) <= LARGEST_NUMBER)
            bad = np.bincount(row[wrong], minlength=len(lengths)) > 0
            self.require(name + WEIGHTS, ~bad, "a weight must be finite in 32 bits")
        return _Bags(lengths, items, numbers)

    def require_stored(
        self, names: list[str], values: list[Float64Array], transforms: _Transforms
    ) -> None:
        """Refuse numbers that the transform makes too large for 32 bits."""
        for column, name in enumerate(names):
            parts = (numbers[column] for numbers in transforms)
            stored = transformed(values[column], *parts)
            rule = "a number must be finite in 32 bits, also after (value - mean) / deviation"
            self.require(name, ~(np.abs(stored) > LARGEST_NUMBER), rule)

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
    if name in (table.numerical or []):
        return "multi-valued" if profile.kind == "list" else "numerical", "given"
    _refuse_inexact(path, name, profile)
    if name in (table.categorical or []):
        return "multi-valued" if profile.kind == "list" else "categorical", "given"
    _refuse_word(name, profile)
    if profile.kind == "date":
        raise InputError(
            f"{path}: the kind of the column {name!r} cannot be inferred, got dates. Set "
            "data.exclude to leave it out, name it in data.time or data.categorical, or convert it "
            "to numbers."
        )
    if profile.is_unique and profile.kind in ("integer", "text"):
        raise InputError(
            f"{path}: the column {name!r} must not have as many values as rows, as a row id has, "
            f"got {profile.count:,}. Set data.exclude=[{name}] to leave it out, or name it in "
            "data.numerical (a measurement) or data.categorical."
        )
    return _INFERRED[profile.kind]


def _refuse_inexact(path: Path | str, name: str, profile: Profile) -> None:
    """Refuse ids in floats that cannot hold them: different ids would be one category."""
    if profile.kind == "integer" and profile.is_inexact:
        raise InputError(
            f"{path}: the column {name!r} must hold its ids as integers or texts, got floats so "
            "large that neighbouring ids are one. Store it as integers or texts, or name it in "
            "data.numerical if it is a measurement."
        )


def _refuse_word(name: str, profile: Profile) -> None:
    """Refuse a cell that is not a number, or a date, in a column of numbers or dates."""
    if (word := profile.word) is None:
        return
    remedy = "Correct it"
    if word.kind == "number":
        remedy += ", set data.decimal if numbers have another decimal sign"
    raise InputError(
        f"{word.place}, column {name!r}: expected a {word.kind}, as {word.share} cells seem to be, "
        f"got {word.value[:40]!r}. {remedy}, or name the column in data.categorical if its cells "
        "are names."
    )


def positive_texts(positive: Any) -> list[str] | None:
    """Return the canonical texts of the setting ``data.positive``, in lower case.

    >>> positive_texts(["Yes", 5.0])
    ['yes', '5']
    """
    if positive is None:
        return None
    values = positive if isinstance(positive, list | tuple) else [positive]
    return to_text(pl.Series([str(value) for value in values])).str.to_lowercase().to_list()
