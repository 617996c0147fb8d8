"""Join AliExpress's item files with its user files."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from mtnrec.arrays import BoolArray, Float32Array, Int32Array, Int64Array
from mtnrec.data.prepared.store import Arrays
from mtnrec.data.prepared.vocabulary import ValueCounts
from mtnrec.data.prepared.writer import Writer
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block
from mtnrec.data.raw.delimited import Rows, read_delimited
from mtnrec.data.raw.progress import ReadProgress

CATEGORICAL = tuple(f"categorical_{i}" for i in range(1, 17))
NUMERICAL = tuple(f"numerical_{i}" for i in range(1, 64))
LABELS = ("click", "conversion")

_USER_CATEGORICAL, _USER_NUMERICAL = 9, 23
_ITEM_CATEGORICAL_COLUMNS = (19, 34, 35, 36, 40, 41, 42)  # in the item file, counted from 1


def _user_types() -> dict[str, Any]:
    categorical, numerical = CATEGORICAL[:_USER_CATEGORICAL], NUMERICAL[:_USER_NUMERICAL]
    return {
        "search_id": pl.Int64,
        **dict.fromkeys(categorical[:7], pl.Int32),
        **dict.fromkeys(numerical, pl.Float64),
        **dict.fromkeys(categorical[7:], pl.Int32),
    }


def _item_types() -> dict[str, Any]:
    categorical, numerical = (
        iter(CATEGORICAL[_USER_CATEGORICAL:]),
        iter(NUMERICAL[_USER_NUMERICAL:]),
    )
    types: dict[str, Any] = {"search_id": pl.Int64}
    for column in range(2, 49):
        if column in _ITEM_CATEGORICAL_COLUMNS:
            types[next(categorical)] = pl.Int32
        else:
            types[next(numerical)] = pl.Float64
    return types | {"label": pl.Int64}


_JOINED_TYPES = {
    "search_id": pl.Int64,
    **dict.fromkeys(CATEGORICAL, pl.Int32),
    **dict.fromkeys(NUMERICAL, pl.Float64),
    **dict.fromkeys(LABELS, pl.Int64),
}
_USER_ROW = np.dtype(
    [("categorical", np.int32, _USER_CATEGORICAL), ("numerical", np.float32, _USER_NUMERICAL)]
)


class Searches:
    """User file of a split: ids in memory, features in a temporary file.

    Args:
        ids: Search ids in the order of the file.
        file: One ``_USER_ROW`` per search.
    """

    def __init__(self, ids: Int64Array, file: IO[bytes]) -> None:
        self._order = ids.argsort(kind="stable")
        self._sorted = ids[self._order]
        self._file = file
        self.found = np.zeros(len(ids), np.bool_)

    def match(self, ids: Int64Array) -> tuple[Int64Array, ...]:
        """Return the pairs of item rows and user rows with the same id, item rows ascending."""
        first = np.searchsorted(self._sorted, ids, side="left")
        count = np.searchsorted(self._sorted, ids, side="right") - first
        item = np.repeat(np.arange(len(ids)), count)
        nth = np.arange(len(item)) - np.repeat(count.cumsum() - count, count)
        user = self._order[np.repeat(first, count) + nth]
        self.found[user] = True
        return item, user

    def rows(self, user: Int64Array) -> npt.NDArray[Any]:
        """Return the features of user rows."""
        if not len(user):
            return np.empty(0, _USER_ROW)
        # Mapped on every call, so that the pages are released.
        return np.memmap(self._file, _USER_ROW, mode="r")[user]


@dataclass
class Join:
    """Joins the files of each split and appends their rows with raw ids.

    Args:
        writer: Receives the rows.
        meter: Counts the rows.
        drops_orphans: Whether conversions without a click are dropped.
        bad_rows: Policy per split for rows that break the format.
    """

    writer: Writer
    meter: ReadProgress
    drops_orphans: bool
    bad_rows: dict[str, BadRows]
    counts: list[ValueCounts] = field(default_factory=lambda: [ValueCounts() for _ in CATEGORICAL])
    _report: dict[str, int] = field(default_factory=dict)

    def copy(self, split: str, blocks: Iterator[Block]) -> None:
        """Append the rows of a joined file."""
        bad_rows, orphans = self.bad_rows[split], 0
        for rows in read_delimited(blocks, _JOINED_TYPES, bad_rows, has_header=True):
            labels = rows.frame.select(LABELS).to_numpy()
            bad = ((labels != 0) & (labels != 1)).any(axis=1)
            rows.refuse(bad, "labels must be 0 or 1", labels, bad_rows)
            orphan = ~bad & (labels[:, 1] > labels[:, 0])
            if not self.drops_orphans:
                rule = (
                    "a conversion needs a click (set data.conversion_without_click=drop to drop "
                    "and count it)"
                )
                rows.refuse(orphan, rule, labels, bad_rows)
            else:
                orphans += int(orphan.sum())
            numerical, infinite = _float32(rows, NUMERICAL, bad | orphan, bad_rows)
            arrays = {
                "categorical": rows.frame.select(CATEGORICAL).to_numpy(),
                "numerical": numerical,
                "labels": labels,
                "group": rows.frame["search_id"].to_numpy(),
            }
            keep = ~(bad | orphan | infinite)
            self._append(split, {stem: array[keep] for stem, array in arrays.items()})
            self.meter.advance(len(keep))
        self._report[f"{split}_conversions_without_click"] = orphans

    def read_searches(self, split: str, blocks: Iterator[Block], file: IO[bytes]) -> Searches:
        """Read a user file and write its features to ``file``."""
        bad_rows = self.bad_rows[split]
        ids = [np.empty(0, np.int64)]
        types = _user_types()
        for rows in read_delimited(blocks, types, bad_rows, has_header=False):
            bad = np.zeros(rows.frame.height, np.bool_)
            numerical, infinite = _float32(rows, NUMERICAL[:_USER_NUMERICAL], bad, bad_rows)
            users = np.empty(len(numerical), _USER_ROW)
            users["numerical"] = numerical
            users["categorical"] = rows.frame.select(CATEGORICAL[:_USER_CATEGORICAL]).to_numpy()
            users[~infinite].tofile(file)
            ids.append(rows.frame["search_id"].to_numpy()[~infinite])
            self.meter.advance(rows.frame.height)
        file.flush()
        return Searches(np.concatenate(ids), file)

    def join(self, split: str, searches: Searches, blocks: Iterator[Block]) -> None:
        """Append the rows of an item file, each joined with the user of its search."""
        bad_rows, unmatched, last, in_order = self.bad_rows[split], 0, -1, True
        order: list[Int32Array] = [np.empty(0, np.int32)]
        for rows in read_delimited(blocks, _item_types(), bad_rows, has_header=False):
            label = rows.frame["label"].to_numpy()
            bad = (label < 0) | (label > 2)
            rule = "the label must be 0 (impression), 1 (click) or 2 (purchase)"
            rows.refuse(bad, rule, label, bad_rows)
            numerical, infinite = _float32(rows, NUMERICAL[_USER_NUMERICAL:], bad, bad_rows)
            ids = rows.frame["search_id"].to_numpy()
            good = np.flatnonzero(~(bad | infinite))
            item, user = searches.match(ids[good])
            unmatched += len(good) - len(np.unique(item))
            item = good[item]
            users = searches.rows(user)
            categorical = rows.frame.select(CATEGORICAL[_USER_CATEGORICAL:]).to_numpy()
            self._append(
                split,
                {
                    "categorical": np.concatenate([users["categorical"], categorical[item]], 1),
                    "numerical": np.concatenate([users["numerical"], numerical[item]], 1),
                    "labels": np.stack([label[item] >= 1, label[item] == 2], axis=1),
                    "group": ids[item],
                },
            )
            in_order &= bool((np.diff(user, prepend=last) >= 0).all())
            last = user[-1] if len(user) else last
            order.append(user.astype(np.int32))
            self.meter.advance(rows.frame.height)
        if not in_order:
            self.writer.close_arrays()
            self.writer.permute(split, np.concatenate(order).argsort(kind="stable"))
        self._report[f"{split}_items_without_search"] = unmatched
        self._report[f"{split}_searches_without_item"] = int((~searches.found).sum())

    def _append(self, split: str, arrays: Arrays) -> None:
        self.writer.append(split, arrays)
        if split == "train":
            for column, values in enumerate(self.counts):
                values.update(arrays["categorical"][:, column])

    def report(self) -> dict[str, int]:
        """Return the counts, and warn about skipped rows."""
        for bad in self.bad_rows.values():
            bad.warn()
        skipped = {f"{split}_rows_skipped": bad.count for split, bad in self.bad_rows.items()}
        return self._report | skipped


def _float32(
    rows: Rows, names: tuple[str, ...], refused: BoolArray, bad_rows: BadRows
) -> tuple[Float32Array, BoolArray]:
    """Return numerical features and the rows refused because one is not finite.

    Rows in ``refused`` are not refused again.
    """
    values = rows.frame.select(names).to_numpy()
    with np.errstate(over="ignore"):
        numerical = values.astype(np.float32)
    finite = np.isfinite(numerical)
    infinite = ~finite.all(axis=1) & ~refused
    for row in np.flatnonzero(infinite):
        column = int(np.flatnonzero(~finite[row])[0])
        only = np.arange(len(infinite)) == row
        rows.refuse(only, f"{names[column]} must be finite", values[:, column], bad_rows)
    return numerical, infinite
