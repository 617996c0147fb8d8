"""Encoding of raw values as inputs of a trained model."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl
import torch

from mtnrec.arrays import BoolArray, Float32Array, Float64Array, Int32Array
from mtnrec.batch import Bags, Batch
from mtnrec.checks import InputError, format_names
from mtnrec.data.prepared.manifest import LARGEST_NUMBER
from mtnrec.data.prepared.vocabulary import TextVocabulary, Vocabulary
from mtnrec.data.raw.column import to_bags, to_numbers, to_text, transformed
from mtnrec.data.raw.tabular import check_row_groups, readable
from mtnrec.schema import CategoricalField, Schema

_INT32 = np.iinfo(np.int32)


class Encoder:
    """Turns raw values into indices and numbers, as the preparation of the data set did.

    Values that are missing, or rare or absent in the training rows, have index 0. A multi-valued
    field is a column of lists; the optional column of lists ``<field>_weights`` holds the weights
    of its values, which default to 1.

    Args:
        schema: The fields.
        vocabularies: By field, the raw values (integers or texts) in the order of their indices,
            which start at 1.
        transforms: By numerical feature: a missing value becomes ``fill``, then ``(value - shift) /
            scale``.

    Raises:
        InputError: If a vocabulary does not match its field.

    Attributes:
        unseen: By field, number of values without an index so far.
        known: By field, number of values with an index so far.
        missing: By field, number of cells without a value so far.
    """

    def __init__(
        self,
        schema: Schema,
        vocabularies: Mapping[str, pl.Series],
        transforms: Mapping[str, Mapping[str, float]],
    ) -> None:
        self._schema = schema
        for field in (*schema.categorical, *schema.multivalued):
            if field.name in vocabularies:
                _check_vocabulary(field, vocabularies[field.name])
        self._vocabularies = {
            name: TextVocabulary(values)
            if values.dtype == pl.String
            else Vocabulary(values.to_numpy())
            for name, values in vocabularies.items()
        }
        self._values = vocabularies
        self._transforms = transforms
        fields = [field.name for field in (*schema.categorical, *schema.multivalued)]
        self.unseen = dict.fromkeys(fields, 0)
        self.known = dict.fromkeys(fields, 0)
        self.missing = dict.fromkeys([*fields, *schema.numerical], 0)

    @property
    def columns(self) -> list[str]:
        """Columns that a table must have."""
        return [*self.missing]

    @property
    def lists(self) -> list[str]:
        """Columns that hold lists, including the optional columns of weights."""
        names = [field.name for field in self._schema.multivalued]
        return [*names, *map(_weight_column, names)]

    def values(self, name: str) -> list[int] | list[str] | None:
        """Return a field's raw values in the order of their indices, from 1; None if unknown."""
        return self._values[name].to_list() if name in self._values else None

    def encode(self, frame: pl.DataFrame, place: Callable[[int], str]) -> Batch:
        """Return the rows of a frame without labels; columns that are not features are ignored.

        Args:
            frame: Has :attr:`columns`; a missing cell is null.
            place: Describes the place of a row in error messages.

        Raises:
            InputError: If a column is missing, a value is not a number, or a number is missing
                although the model's data had none missing.
        """
        if lacking := [name for name in self.columns if name not in frame.columns]:
            raise InputError(
                f"the rows lack the column {format_names(lacking)}, which the model needs; "
                f"they have {format_names(frame.columns)}"
            )
        rows = frame.height
        categorical = [
            self._indices(field.name, frame[field.name]) for field in self._schema.categorical
        ]
        numerical = [self._numbers(name, frame[name], place) for name in self._schema.numerical]
        return Batch(
            torch.from_numpy(np.column_stack([np.empty((rows, 0), np.int32), *categorical])),
            torch.from_numpy(np.column_stack([np.empty((rows, 0), np.float32), *numerical])),
            bags=tuple(self._bags(field.name, frame, place) for field in self._schema.multivalued),
        )

    def _indices(self, name: str, column: pl.Series) -> Int32Array:
        if name not in self._vocabularies:
            raise InputError(
                f"the data set that the model was trained on has no vocabulary for {name!r}, so "
                "its raw values cannot be scored. Choose prepared rows with data=NAME."
            )
        vocabulary = self._vocabularies[name]
        text = to_text(column)
        absent = text.is_null().to_numpy()
        if isinstance(vocabulary, TextVocabulary):
            indices = vocabulary.encode(text)
        else:
            # Through text, since casting 2.5 to an integer would give 2.
            whole = text.cast(pl.Int64, strict=False)
            known = whole.is_between(_INT32.min, _INT32.max).fill_null(value=False).to_numpy()
            values = whole.fill_null(0).to_numpy()
            indices = vocabulary.encode(np.where(known, values, 0).astype(np.int32))
            indices = np.where(known, indices, 0).astype(np.int32)
        self.missing[name] += int(np.count_nonzero(absent))
        self.unseen[name] += int(np.count_nonzero((indices == 0) & ~absent))
        self.known[name] += int(np.count_nonzero(indices))
        return indices

    def _numbers(self, name: str, column: pl.Series, place: Callable[[int], str]) -> Float32Array:
        values = _read_numbers(name, column, place)
        absent = np.isnan(values)
        transform = self._transforms.get(name, {})
        if absent.any():
            if "fill" not in transform:
                raise InputError(
                    f"{place(int(absent.argmax()))}, column {name!r}: a number is missing, but the "
                    "model's data had none missing. Set a value before scoring."
                )
            self.missing[name] += int(np.count_nonzero(absent))
        parts = {"fill": np.nan, "shift": 0.0, "scale": 1.0} | dict(transform)
        stored = transformed(values, **parts)
        _require_finite(name, np.abs(stored) > LARGEST_NUMBER, column, place)
        return stored.astype(np.float32)

    def _bags(self, name: str, frame: pl.DataFrame, place: Callable[[int], str]) -> Bags:
        lengths, items = to_bags(frame[name])
        row = np.repeat(np.arange(len(lengths)), lengths)
        items = to_text(items)
        if items.null_count():
            first = int(row[items.is_null().arg_max() or 0])
            raise InputError(
                f"{place(first)}, column {name!r}: a list must not hold missing values. Delete "
                "them."
            )
        tokens = self._indices(name, items)
        self.missing[name] += int((lengths == 0).sum())
        weights = np.ones(len(tokens), np.float32)
        if (given := _weight_column(name)) in frame.columns:
            others, values = to_bags(frame[given])
            if (differ := others != lengths).any():
                first = int(differ.argmax())
                raise InputError(
                    f"{place(first)}: the lists {name!r} and {given!r} differ in length"
                )
            read = _read_numbers(given, values, lambda item: place(int(row[item])))
            _require_finite(given, np.isnan(read), values, lambda item: place(int(row[item])))
            weights = read.astype(np.float32)
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return Bags(*map(torch.from_numpy, (tokens, weights, offsets)))


def _weight_column(name: str) -> str:
    return f"{name}_weights"


def _read_numbers(name: str, column: pl.Series, place: Callable[[int], str]) -> Float64Array:
    """Return a column as numbers; NaN where a cell is missing."""
    read = to_numbers(column)
    values = read.fill_null(np.nan).to_numpy()
    wrong = (read.is_null() & column.is_not_null()).to_numpy() | (np.abs(values) > LARGEST_NUMBER)
    _require_finite(name, wrong, column, place)
    return values


def _require_finite(
    name: str, wrong: BoolArray, column: pl.Series, place: Callable[[int], str]
) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        remedy = "Correct it, or set decimal if numbers have another decimal sign."
        raise InputError(
            f"{place(row)}, column {name!r}: a number must be finite in 32 bits, got "
            f"{column[row]!r}. {remedy if column.dtype == pl.String else 'Correct it.'}"
        )


def _check_vocabulary(field: CategoricalField, values: pl.Series) -> None:
    ascends = not values.dtype.is_nested() and values.is_sorted() and values.is_unique().all()
    if (
        values.dtype not in (pl.Int32, pl.String)
        or values.null_count()
        or len(values) + 1 != field.vocabulary_size
        or not ascends
    ):
        raise InputError(
            f"the vocabulary of {field.name!r} is damaged: it must hold "
            f"{field.vocabulary_size - 1} integers or texts in ascending order. Prepare the data "
            "set again."
        )


def read_vocabularies(files: Mapping[str, Any]) -> dict[str, pl.Series]:
    """Read vocabularies from open ``vocabulary/<field>.parquet`` files, by field.

    Raises:
        InputError: If one is damaged or too large for memory.
    """
    vocabularies = {}
    for name, file in files.items():
        with readable(f"the vocabulary of {name!r}"):
            check_row_groups(f"the vocabulary of {name!r}", file)
            file.seek(0)
            vocabularies[name] = pl.read_parquet(file).sort("index")["value"]
    return vocabularies
