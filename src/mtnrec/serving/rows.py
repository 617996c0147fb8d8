"""Rows to score, batch by batch: those of a prepared data set, or raw values of a table."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from mtnrec.arrays import Float32Array
from mtnrec.batch import Batch
from mtnrec.checks import InputError, check_choice, check_integer, format_names
from mtnrec.data.batches import RowGatherer
from mtnrec.data.datamodule import DataModule
from mtnrec.data.preparation.table import positive_texts
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.column import to_labels, to_text
from mtnrec.data.raw.tabular import Chunk, FileSource, check_dialect
from mtnrec.serving.scorer import Scorer, shifted


class Part(NamedTuple):
    """Rows of one batch.

    Args:
        batch: The rows; their labels are NaN where the table has none or an invalid one.
        place: Describes the place of a row in error messages.
        kept: Columns that are copied to the scores.
    """

    batch: Batch
    place: Callable[[int], str]
    kept: pa.Table


class Rows(Protocol):
    """Rows in order, batch by batch.

    Attributes:
        total: Number of rows; None if it is not known in advance.
        has_labels: Whether they have labels.
        form: Separator and decimal sign of csv files, in words; empty if there are none.
    """

    total: int | None
    has_labels: bool
    form: str

    def __iter__(self) -> Iterator[Part]:
        """Yield the rows of each batch."""
        ...


class PreparedRows:
    """The rows of a prepared data set.

    Args:
        scorer: Scorer of a model trained on a set with the same fields and vocabularies.
        directory: Folder of the prepared data set.
        split: ``train``, ``test`` or another test set.
        batch_size: Rows scored at a time.

    Raises:
        InputError: If indices or scales of the set differ from those the model was trained with.
    """

    has_labels = True
    form = ""

    def __init__(self, scorer: Scorer, directory: Path, split: str, batch_size: int) -> None:
        manifest, arrays = open_prepared(directory)
        check_choice("split", split, sorted(arrays))
        known = scorer.manifest
        if manifest.schema != known.schema or manifest.transforms != known.transforms:
            what = "fields and scales"
        elif _vocabulary_checksums(manifest.checksums) != _vocabulary_checksums(known.checksums):
            what = "vocabularies"
        else:
            what = None
        if what is not None:
            raise InputError(
                f"{directory} must have the {what} of the data set that the model was trained on "
                f"({known.source}), got different ones. Choose table=FILE to score raw values, or "
                "prepare the set with the same training rows."
            )
        rows = manifest.rows[split]
        self.total: int | None = rows
        self._gather = RowGatherer(arrays[split], np.arange(rows), manifest.schema)
        self._batch_size = batch_size
        self._place = lambda row: f"row {row} of {directory / split}"

    def __iter__(self) -> Iterator[Part]:
        for start in range(0, len(self._gather), self._batch_size):
            end = min(start + self._batch_size, len(self._gather))
            rows = np.arange(start, end)
            yield Part(self._gather[rows], shifted(self._place, start), pa.table({}))


class TableRows:
    """The rows of a table of raw values.

    Args:
        scorer: The model.
        path: A file, a pattern or a folder as in
            :class:`~mtnrec.data.raw.tabular.FileSource`; columns that the model does not need are
            ignored.
        batch_size: Rows scored at a time.
        keep: Columns copied to the scores unchanged, e.g. an id.
        group: Column of the user or search, for the grouped AUC.
        separator: Separator of the cells of csv files; None to infer it.
        decimal: Decimal sign of the numbers in csv files; None to infer it.

    Raises:
        InputError: If the table cannot be read or lacks a column.
    """

    def __init__(
        self,
        scorer: Scorer,
        path: Path,
        batch_size: int,
        *,
        keep: Sequence[str] = (),
        group: str | None = None,
        separator: str | None = None,
        decimal: str | None = None,
    ) -> None:
        self.total: int | None = None
        separator = check_dialect("", separator, decimal)
        self._source = FileSource("table", path, separator, decimal)
        self.form = self._source.form
        self._source.require_columns("the model", scorer.encoder.columns)
        self._source.require_columns("keep", list(keep))
        self._source.require_columns("group", [] if group is None else [group])
        if taken := [name for name in keep if name in scorer.tasks]:
            raise InputError(
                f"keep must not name columns of the scores, got {format_names(taken)}. Rename them."
            )
        self._schema = scorer.manifest.schema
        self.has_labels = set(self._schema.labels) <= set(self._source.columns)
        self._labels = self._schema.labels if self.has_labels else ()
        self._positive = scorer.manifest.parameters.get("positive")
        self._negatives: dict[str, str] = {}
        self._keep, self._group = list(keep), group
        self._encoder, self._batch_size = scorer.encoder, batch_size

    def __iter__(self) -> Iterator[Part]:
        encoder = self._encoder
        read = {*encoder.columns, *encoder.lists, *self._labels, self._group}
        names = (*self._source.columns, *self._source.index)
        chunks = self._source.chunks(
            [name for name in names if name in read or name in self._keep],
            BadRows("refuse"),
            lists=encoder.lists,
            any_type=[name for name in self._keep if name not in read],
        )
        for chunk in chunks:
            for start in range(0, chunk.frame.height, self._batch_size):
                yield self._part(chunk, start)

    def _part(self, chunk: Chunk, start: int) -> Part:
        frame = chunk.frame.slice(start, self._batch_size)
        place = shifted(chunk.place, start)
        batch = self._encoder.encode(frame, place)
        if self.has_labels:
            columns = [self._read_label(frame[name]) for name in self._labels]
            batch.labels = torch.from_numpy(np.stack(columns, axis=1))
        if self._group is not None:
            batch.group = _read_groups(frame[self._group], place)
        kept = chunk.stored.select(self._keep).slice(start, self._batch_size).to_arrow()
        return Part(batch, place, kept)

    def _read_label(self, column: pl.Series) -> Float32Array:
        """Return a label as in the training data; NaN where it is missing or invalid.

        Under a single positive value only one other may occur: the first found.
        """
        positive = positive_texts(self._positive)
        read = to_labels(column, positive).cast(pl.Float32).fill_null(np.nan).to_numpy().copy()
        if positive is None or isinstance(self._positive, list | tuple):
            return read
        text = to_text(column).str.to_lowercase()
        others = text.filter(read == 0)
        if others.len():
            negative = self._negatives.setdefault(column.name, str(others[0]))
            read[(read == 0) & (text != negative).fill_null(value=False).to_numpy()] = np.nan
        return read


def open_rows(
    scorer: Scorer,
    *,
    data: DataModule | None,
    table: str | None,
    split: str,
    batch_size: int,
    keep: Sequence[str] = (),
    group: str | None = None,
    separator: str | None = None,
    decimal: str | None = None,
) -> Rows:
    """Open a split of a prepared data set, or a table; see the two classes above.

    Raises:
        InputError: If not exactly one of ``data`` and ``table`` is given, an argument about a table
            comes with ``data``, or the rows cannot be read.
    """
    check_integer("batch_size", batch_size, minimum=1)
    if (data is None) == (table is None):
        given = "neither" if data is None else "both"
        raise InputError(
            f"exactly one of data and table must be given, got {given}. Set data=NAME (a prepared "
            "data set) or table=FILE (raw values)."
        )
    if table is not None:
        return TableRows(
            scorer,
            Path(table),
            batch_size,
            keep=keep,
            group=group,
            separator=separator,
            decimal=decimal,
        )
    assert data is not None
    of_table = {"keep": list(keep), "group": group, "separator": separator, "decimal": decimal}
    for key, value in of_table.items():
        if value:
            raise InputError(
                f"{key} must come with table=FILE, got {key}={value} with data. Leave {key} out."
            )
    data.prepare_data()
    return PreparedRows(scorer, data.folder, split, batch_size)


def _read_groups(column: pl.Series, place: Callable[[int], str]) -> Tensor:
    """Return an int64 per group, ``(rows,)``: a hash of its text."""
    if column.null_count():
        row = int(column.is_null().arg_max() or 0)
        raise InputError(f"{place(row)}, column {column.name!r}: a group must not be missing")
    hashes = to_text(column).hash(0).to_numpy()
    return torch.from_numpy(hashes.view(np.int64).copy())


def _vocabulary_checksums(checksums: dict[str, str]) -> dict[str, str]:
    return {name: sum_ for name, sum_ in checksums.items() if name.startswith("vocabulary/")}
