"""A custom table: any csv or Parquet file with a column per feature and label.

The file is read three times, in bounded memory: to find the kind of each column and the split; to
fit the vocabularies and means to the training rows; and to write. Only the vocabularies grow with
the data, and 9 bytes per row to draw a random split and 17 to sort by time.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import rich.table
from rich import box
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from mtnrec.arrays import BoolArray, Float64Array, Int64Array
from mtnrec.checks import InputError, check_choice, check_flag, check_integer, check_number
from mtnrec.data.datamodule import SelfPreparing
from mtnrec.data.prepared.manifest import LARGEST_NUMBER, Manifest
from mtnrec.data.prepared.store import Arrays
from mtnrec.data.prepared.vocabulary import TextCounts, TextVocabulary
from mtnrec.data.prepared.writer import Writer, write_prepared
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
from mtnrec.data.raw.tabular import (
    ArrowStream,
    Chunk,
    FrameSource,
    Source,
    check_table,
    is_frame,
    open_source,
)
from mtnrec.schema import CategoricalField, Schema

_SPLITS = ("train", "test")
_OTHER = ("origin", "name")  # do not determine the prepared bytes
_LISTS = ("labels", "categorical", "numerical", "exclude")
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


@dataclass(kw_only=True, eq=False, repr=False)
class Table(SelfPreparing):
    """A custom table; training prepares it if its folder is missing.

    The kind of a column that ``categorical`` and ``numerical`` do not name is inferred from
    ``train``: text, booleans and integers with at most 100 distinct values are categorical, other
    numbers are numerical; dates are refused. If both are given, other columns are left out. Labels,
    group, time and excluded columns are never features.

    Categorical values are strings (an integer is its digits), numbered in byte order; missing, rare
    and unseen values have index 0.

    Args:
        dir: Folder of the prepared data set. If None, a table in memory uses a temporary
            folder that is deleted with this object; other processes and copies of this object
            create their own.
        train: ``.csv``, ``.csv.gz`` or ``.parquet`` file, a folder of ``.parquet`` files, or a
            table in memory: a frame of pandas (without its index), polars, pyarrow or any library
            with the Arrow PyCapsule stream interface. If None, training uses what ``dir`` holds,
            regardless of the other settings.
        test: Table of the test rows, as for ``train``; if None, ``split`` takes them from
            ``train``.
        labels: Columns of 0 and 1 or true and false, without missing values.
        funnel: Whether the second label requires the first (click, conversion).
        categorical: Categorical columns; None to infer them.
        numerical: Numerical columns; None to infer them.
        exclude: Columns to leave out.
        group: Column of the user or search. Int64Array are kept, other values are numbered.
        time: Column of numbers or dates (``YYYY-MM-DD``, ``YYYY-MM-DD HH:MM:SS``); the rows of each
            split are sorted by it, so that ``validation_split=last`` validates on the latest
            training rows.
        split: ``random``, ``grouped`` (whole groups drawn at random) or ``time`` (the last rows).
        test_share: Share of the rows (or groups) in the test split, in (0, 1).
        test_seed: Seed of the random test split.
        fill: Replacement for missing numbers: a value, or ``mean`` for that of the training rows;
            None refuses missing numbers.
        standardise: Whether to store ``(value - mean) / deviation``, both of the filled training
            rows; a constant column is divided by 1.
        min_count: Minimum number of training rows with a categorical value to give it an index.
        conversion_without_click: ``refuse`` a conversion without a click under ``funnel``, or
            ``drop`` and count it.
        on_error: ``refuse`` a row that breaks a rule, or ``skip`` and count it.
    """

    origin: ClassVar[str] = "It is made from your own table."

    name: str = "table"
    train: str | Path | ArrowStream | None = None
    test: str | Path | ArrowStream | None = None
    labels: list[str] | None = None
    funnel: bool = False
    categorical: list[str] | None = None
    numerical: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    group: str | None = None
    time: str | None = None
    split: str = "random"
    test_share: float = 0.2
    test_seed: int = 0
    fill: float | str | None = None
    standardise: bool = False
    min_count: int = 1
    conversion_without_click: str = "refuse"
    on_error: str = "refuse"

    def __post_init__(self) -> None:
        self._identities: dict[str, Any] | None = None  # of tables in memory: see _open
        self._check_tables()
        self._choose_folder()
        super().__post_init__()
        for key in _LISTS:
            if getattr(self, key) is not None:
                setattr(self, key, _names(f"data.{key}", getattr(self, key)))
        for key in ("group", "time"):
            if getattr(self, key) is not None:
                setattr(self, key, _names(f"data.{key}", [getattr(self, key)])[0])
        check_flag("data.funnel", self.funnel)
        check_flag("data.standardise", self.standardise)
        check_choice("data.split", self.split, ["random", "grouped", "time"])
        check_number("data.test_share", self.test_share, minimum=0, maximum=1, open_maximum=True)
        if self.test_share == 0:
            raise InputError(
                "data.test_share must be above 0, got 0. Set data.test to use a separate table."
            )
        check_integer("data.test_seed", self.test_seed, minimum=0)
        check_integer("data.min_count", self.min_count, minimum=1)
        if self.fill not in (None, "mean"):
            check_number("data.fill", self.fill, minimum=-LARGEST_NUMBER, maximum=LARGEST_NUMBER)
        drop = ["refuse", "drop"]
        check_choice("data.conversion_without_click", self.conversion_without_click, drop)
        check_choice("data.on_error", self.on_error, BadRows.CHOICES)
        self._check_roles()

    def _check_tables(self) -> None:
        for key in _SPLITS:
            if getattr(self, key) is not None:
                check_table(f"data.{key}", getattr(self, key))

    def _choose_folder(self) -> None:
        """Create a temporary folder for a table in memory, unless ``dir`` is given."""
        in_memory = is_frame(self.train) or is_frame(self.test)
        self._is_temporary = in_memory and self.dir is None
        if self._is_temporary:
            temporary = tempfile.TemporaryDirectory(prefix="mtnrec-", ignore_cleanup_errors=True)
            weakref.finalize(self, temporary.cleanup)
            self.dir = Path(temporary.name, self.name)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        return state | {"dir": None, "_verified": False} if self._is_temporary else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.dir is None:
            self._choose_folder()

    def _check_roles(self) -> None:
        roles: dict[str, str] = {}
        for key, names in self.named.items():
            for name in names:
                if name in roles:
                    raise InputError(
                        f"the column {name!r} must have one role, got {roles[name]} and {key}. "
                        "Delete it from one of them."
                    )
                roles[name] = key
        if self.labels is not None:
            Schema((), (), tuple(self.labels), self.funnel)  # raises on a wrong number of labels
        needed = {"grouped": "group", "time": "time"}.get(self.split)
        if self.test is None and needed is not None and getattr(self, needed) is None:
            raise InputError(f"data.split={self.split} needs a column. Set data.{needed}=COLUMN.")

    @property
    def named(self) -> dict[str, list[str]]:
        """Columns that each setting names."""
        named = {f"data.{key}": getattr(self, key) or [] for key in _LISTS}
        for key in ("group", "time"):
            if getattr(self, key) is not None:
                named[f"data.{key}"] = [getattr(self, key)]
        return named

    def _how_to_prepare(self) -> str:
        if self.train is not None:
            return super()._how_to_prepare()
        return (
            f"Then: python -m mtnrec.prepare data=table data.name={self.name} data.train=FILE "
            "data.labels=[COLUMN,COLUMN]"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings, and the identity of each table: names and sizes of files, hashes of frames.

        A hash dates from the last time that ``prepare`` read the frames.
        """
        settings = {key: getattr(self, key) for key in Table.__annotations__ if key not in _OTHER}
        if self._identities is not None:
            return settings | self._identities
        return settings | {split: source.identity for split, source in self._open().items()}

    def setup(self, stage: str | None = None) -> None:
        if self._is_temporary and self._arrays is None:
            self.prepare_data()  # Lightning calls it in only one process per machine
        super().setup(stage)

    def prepare_data(self) -> None:
        """Prepare ``train`` if the folder is missing or empty; without ``train``, use the folder.

        Raises:
            InputError: If the folder was prepared with different settings or tables.
        """
        if self.train is None:
            super(SelfPreparing, self).prepare_data()
        else:
            super().prepare_data()

    def prepare(self) -> Manifest:
        """Read the table and write the prepared data set.

        Raises:
            InputError: If a setting or the table breaks a rule.
        """
        sources = self._open()
        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,} rows"))
        with (
            write_prepared(self.folder, _SPLITS) as writer,
            Progress(*columns, TimeElapsedColumn()) as progress,
        ):
            return _Preparation(self, sources, writer, progress).run()

    def _open(self) -> dict[str, Source]:
        if self.train is None or self.labels is None:
            raise InputError(
                "data.train and data.labels must be given. Set them to the table and its columns "
                "of 0 and 1, `data.train=FILE data.labels=[COLUMN,COLUMN]`."
            )
        sources = {"train": open_source("data.train", self.train)}
        if self.test is not None:
            sources["test"] = open_source("data.test", self.test)
        for source in sources.values():
            for key, names in self.named.items():
                if key != "data.exclude" or source is sources["train"]:
                    source.require_columns(key, names)
        if any(isinstance(source, FrameSource) for source in sources.values()):
            # Cached: reading a frame again is slow, and a stream cannot be read twice.
            self._identities = {split: source.identity for split, source in sources.items()}
        return sources


def _names(key: str, names: Any) -> list[str]:
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str | int) and not isinstance(name, bool) for name in names
    ):
        raise InputError(f"{key} must name columns, `{key}=[COLUMN,COLUMN]`, got {names!r}")
    return [str(name) for name in names]


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


class _Preparation:
    """The three passes over a table."""

    def __init__(
        self, table: Table, sources: dict[str, Source], writer: Writer, progress: Progress
    ) -> None:
        self._table = table
        self._labels = table.labels or []
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
        if table.test is not None:
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
        times: dict[str, list[npt.NDArray[Any]]] = {split: [] for split in _SPLITS}
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


def _kind(path: Path | str, name: str, profile: Profile, table: Table) -> tuple[str, str]:
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
