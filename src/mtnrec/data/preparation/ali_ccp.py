"""Join Ali-CCP's skeleton with its common features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mtnrec.arrays import BoolArray, Float32Array, Int32Array, Int64Array
from mtnrec.data.prepared.layout import bag_stem
from mtnrec.data.prepared.store import Arrays
from mtnrec.data.prepared.vocabulary import ValueCounts
from mtnrec.data.prepared.writer import Writer
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import Block
from mtnrec.data.raw.progress import ReadProgress
from mtnrec.data.raw.triples import MISSING, Lines, Selection, describe_error, parse_lines

COMMON_FIELDS = (
    *("101", "109_14", "110_14", "121", "122", "124", "125", "126", "127", "127_14", "128", "129"),
    "150_14",
)
SKELETON_FIELDS = ("205", "206", "207", "210", "216", "301", "508", "509", "702", "853")
USER = "101"

RawBags = tuple[Int64Array, Int32Array, Float32Array]


class Columns:
    """Assignment of the prepared columns to the raw files.

    Args:
        ids: Fields of the categorical columns.
        values: Fields of the numerical columns.
        bags: Multi-valued fields whose tokens are all kept.
        first: Fields whose first triple counts, not the last.
    """

    def __init__(
        self, ids: Sequence[str], values: Sequence[str], bags: Sequence[str], first: Sequence[str]
    ) -> None:
        self.ids, self.values, self.bags = ids, values, bags
        self.value_names = tuple(f"D{name}" for name in values)
        self.common, self.skeleton = (
            Selection(
                ids=[name for name in ids if name in fields],
                values=[name for name in values if name in fields],
                bags=[name for name in bags if name in fields],
                first=first,
            )
            for fields in (COMMON_FIELDS, SKELETON_FIELDS)
        )
        if USER not in self.common.ids:  # always needed as the group
            self.common = replace(self.common, ids=[*self.common.ids, USER])
        joined = [*self.common.ids, *self.skeleton.ids]
        self.id_order = [joined.index(name) for name in ids]
        self.user = joined.index(USER)
        joined = [*self.common.values, *self.skeleton.values]
        self.value_order = [joined.index(name) for name in values]


@dataclass(frozen=True)
class Joined:
    """Impressions of a block, joined with their common features.

    Args:
        arrays: The joined rows, with raw ids and values.
        place: Position of the common line of each row, ``(rows,)``.
        bags: Bags of the skeleton, one entry per field.
        missing: Number of rows that lack each field.
        counts: Ids of each skeleton field and their counts, for training rows only.
        lines: Number of lines in the block.
        orphans: Number of conversions without a click, which are dropped.
        errors: Row, rule and value found, for each line that breaks a rule.
    """

    arrays: Arrays
    place: Int64Array
    bags: list[RawBags]
    missing: dict[str, int]
    counts: dict[str, tuple[Int32Array, Int64Array]]
    lines: int
    orphans: int
    errors: list[tuple[int, str, str]]


def _errors(block: Block, lines: Lines) -> list[tuple[int, str, str]]:
    rows = np.flatnonzero(lines.error).tolist()
    return [(row, *describe_error(block.data, lines, row)) for row in rows]


def _kept(bags: RawBags, keep: BoolArray) -> RawBags:
    """Return the bags of the kept rows."""
    lengths, tokens, weights = bags
    if keep.all():
        return bags
    is_kept = np.repeat(keep, lengths)
    return lengths[keep], tokens[is_kept], weights[is_kept]


class Log:
    """One split: common features in memory, rows streamed to disk.

    The rows hold raw ids and values until the vocabularies and scales are known.

    Args:
        split: ``train`` or ``test``.
        columns: Columns to keep.
        writer: Receives the rows.
        meter: Counts the lines.
        bad_rows: Policy for lines that break the format.
    """

    def __init__(
        self, split: str, columns: Columns, writer: Writer, meter: ReadProgress, bad_rows: BadRows
    ) -> None:
        self._split, self._columns = split, columns
        self._writer, self._meter, self._bad_rows = writer, meter, bad_rows
        self.counts = {name: ValueCounts() for name in columns.ids}
        self.lowest = np.full(len(columns.values), np.inf)
        self.highest = -self.lowest
        self._bag_lengths: dict[str, list[Int64Array]] = {name: [] for name in columns.common.bags}
        self._rows = self._orphans = 0

    def parse_common(self, block: Block) -> Lines:
        """Parse lines of common features; thread-safe."""
        return parse_lines(block.data, self._columns.common, skeleton=False)

    def read_common(self, parsed: Iterator[tuple[Block, Lines]]) -> None:
        """Keep the common features in memory and write their bags.

        Raises:
            InputError: If two lines have the same index.
        """
        index, ids, values, line = [], [], [], []
        for block, lines in parsed:
            good = lines.error == 0
            self._refuse(block, _errors(block, lines))
            index.append(lines.index[good])
            ids.append(lines.ids[good])
            values.append(lines.values[good].astype(np.float32))
            line.append(block.first_line + np.flatnonzero(good))
            for name, bags in zip(self._columns.common.bags, lines.bags, strict=True):
                self._append_bags(name, _kept(bags, good))
            self._meter.advance(len(good))
        self._index = np.concatenate(index)
        self._common_ids, self._common_values = np.concatenate(ids), np.concatenate(values)
        self._common_rows = np.zeros(len(self._index), np.int64)
        self._order = self._index.argsort(kind="stable")
        self._sorted = self._index[self._order]
        line_numbers = np.concatenate(line)
        for place in np.flatnonzero(self._sorted[1:] == self._sorted[:-1]):
            first, second = line_numbers[self._order[place : place + 2]].tolist()
            rule = f"a common index must occur once (line {first} has it too)"
            where = f"{block.source}, line {second}"
            self._bad_rows.add(where, rule, f"{self._sorted[place]:016x}")

    def join(self, block: Block) -> "Joined":
        """Parse impressions and join them with their common features; thread-safe."""
        columns = self._columns
        lines = parse_lines(block.data, columns.skeleton, skeleton=True)
        place, known = self._look_up(lines.index)
        errors = _errors(block, lines)
        good = lines.error == 0
        rule = f"the common index must be in common_features_{self._split}.csv"
        errors += [
            (row, rule, f"{lines.index[row]:016x}")
            for row in np.flatnonzero(good & ~known).tolist()
        ]
        good &= known
        orphans = good & (lines.labels[:, 1] > lines.labels[:, 0])
        keep = good & ~orphans
        place = place[keep]
        ids = np.concatenate([self._common_ids[place], lines.ids[keep]], axis=1)
        values = np.concatenate([self._common_values[place], lines.values[keep]], axis=1)
        values = values[:, columns.value_order]
        categorical = ids[:, columns.id_order]
        user = ids[:, columns.user].astype(np.int64)
        missing = dict(zip(columns.ids, (categorical == MISSING).sum(0), strict=True))
        missing |= dict(zip(columns.value_names, np.isnan(values).sum(0), strict=True))
        counts = {}
        if self._split == "train":
            for column, name in enumerate(columns.ids):
                if name in SKELETON_FIELDS:
                    counts[name] = np.unique(categorical[:, column], return_counts=True)
        return Joined(
            arrays={
                "categorical": categorical,
                "numerical": np.nan_to_num(values).astype(np.float32),
                "labels": lines.labels[keep],
                "group": np.where(user == MISSING, -1 - place, user),
            },
            place=place,
            bags=[_kept(bags, keep) for bags in lines.bags],
            missing=missing,
            counts=counts,
            lines=len(keep),
            orphans=int(orphans.sum()),
            errors=sorted(errors),
        )

    def read_skeleton(self, joined: Iterator[tuple[Block, "Joined"]]) -> None:
        """Append the joined rows."""
        columns = self._columns
        for block, part in joined:
            self._refuse(block, part.errors)
            self._orphans += part.orphans
            self._count_rows(part.place)
            self._writer.missing[self._split].update(part.missing)
            if columns.bags:
                own = self._rows + np.arange(len(part.place))
                bag_columns = [part.place if f in COMMON_FIELDS else own for f in columns.bags]
                part.arrays["bag"] = np.stack(bag_columns, axis=1)
            self._writer.append(self._split, part.arrays)
            for name, bags in zip(columns.skeleton.bags, part.bags, strict=True):
                self._append_bags(name, bags)
            for name, (values, rows) in part.counts.items():
                self.counts[name].update(values, rows)
            if len(part.place):
                numerical = part.arrays["numerical"]
                self.lowest = np.minimum(self.lowest, numerical.min(0))
                self.highest = np.maximum(self.highest, numerical.max(0))
            self._rows += len(part.place)
            self._meter.advance(part.lines)

    def _count_rows(self, place: Int64Array) -> None:
        # The impressions of a block share few common lines, which lie close together.
        first = place.min(initial=len(self._common_rows))
        rows = np.bincount(place - first)
        self._common_rows[first : first + len(rows)] += rows

    def _refuse(self, block: Block, errors: list[tuple[int, str, str]]) -> None:
        for row, rule, found in errors:
            self._bad_rows.add(f"{block.source}, line {block.first_line + row}", rule, found)

    def _look_up(self, index: npt.NDArray[np.uint64]) -> tuple[Int64Array, BoolArray]:
        """Return the common line of each row, and whether it exists."""
        if not len(self._sorted):  # every common line was skipped
            return np.zeros(len(index), np.int64), np.zeros(len(index), np.bool_)
        # Equal indices are contiguous: search once per run of them.
        starts = np.flatnonzero(np.r_[True, index[1:] != index[:-1]])
        lengths = np.diff(np.r_[starts, len(index)])
        found = np.searchsorted(self._sorted, index[starts]).clip(max=len(self._sorted) - 1)
        known = self._sorted[found] == index[starts]
        return np.repeat(self._order[found], lengths), np.repeat(known, lengths)

    def _append_bags(self, name: str, bags: RawBags) -> None:
        lengths, tokens, weights = bags
        self._writer.append_bags(self._split, name, lengths, tokens, weights)
        if name in COMMON_FIELDS:
            self._bag_lengths[name].append(lengths)
        else:
            self._writer.missing[self._split][name] += int((lengths == 0).sum())

    def finish(self) -> dict[str, int]:
        """Complete the counts and return those for the report."""
        for name, lengths in self._bag_lengths.items():
            empty = np.concatenate(lengths) == 0
            self._writer.missing[self._split][name] += int(self._common_rows[empty].sum())
        if self._split == "train":
            for column, name in enumerate(self._columns.common.ids):
                if name in self.counts:
                    self.counts[name].update(self._common_ids[:, column], self._common_rows)
        return {
            f"{self._split}_conversions_without_click": self._orphans,
            f"{self._split}_rows_skipped": self._bad_rows.count,
            f"{self._split}_common_rows": len(self._index),
            f"{self._split}_common_rows_without_impression": int((self._common_rows == 0).sum()),
        }

    def count_tokens(self, name: str) -> ValueCounts:
        """Count how often each token of a multi-valued field occurs in the joined rows."""
        counts = ValueCounts()
        is_common = name in COMMON_FIELDS
        offsets = np.cumsum([0, *np.concatenate(self._bag_lengths[name])]) if is_common else None
        for start, tokens in self._writer.chunks(self._split, bag_stem(name, "tokens")):
            if offsets is None:
                counts.update(tokens)
            else:  # a chunk may begin and end within a bag
                lengths = np.diff(offsets.clip(start, start + len(tokens)))
                counts.update(tokens, np.repeat(self._common_rows, lengths))
        return counts
