"""Parser of Ali-CCP's lines: columns, and a list of triples ``field 0x02 feature id 0x03 value``.

The byte 0x01 joins the triples of a list; the fields come in runs in any order. A line of the
skeleton is ``sample_id,click,conversion,common_index,feature_num,list``, a line of the common
features ``common_index,feature_num,list``. A function compiled by numba reads every byte once,
without the GIL, so that threads parse in parallel.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from mtnrec.arrays import Float32Array, Float64Array, Int32Array, Int64Array, UInt8Array
from mtnrec.data.raw.blocks import count_lines

MISSING = -1  # id of a field that a line lacks; ids are not negative

_COMMA, _NEWLINE, _RETURN, _POINT, _MINUS, _ZERO = b",\n\r.-0"
_NEXT, _ID, _VALUE = 1, 2, 3
_ZERO_BYTE, _TEN = np.uint64(_ZERO), np.uint64(10)  # numba turns uint64 with int64 into a float
_TABLE_BITS = 8
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2 ** 64 over the golden ratio: Fibonacci hashing
_LARGEST_ID = 2**31 - 1
_LONGEST_NAME = 8  # bytes; no field that can be selected has a longer name
_INDEX_DIGITS = 16
# Such a number is exact in float64, and its quotient by a power of ten rounds once.
_MOST_DIGITS = 15
_POWERS = 10.0 ** np.arange(_MOST_DIGITS + 1)

# Rules that a line may break, by the parser's error code.
RULES = (
    "",
    "expected sample_id,click,conversion,common_index,feature_num,list",
    "expected common_index,feature_num,list",
    "sample_id must be an integer",
    "click and conversion must be 0 or 1",
    "the common index must be 16 lower-case hexadecimal digits",
    "feature_num must be an integer",
    "a triple must be field 0x02 id 0x03 value, joined by 0x01",
    f"a feature id must be an integer up to {_LARGEST_ID}",
    f"a value must be a decimal number of at most {_MOST_DIGITS} digits",
    "feature_num must be the number of triples",
)
(
    _,
    _SKELETON_COLUMNS,
    _COMMON_COLUMNS,
    _BAD_SAMPLE,
    _BAD_LABEL,
    _BAD_INDEX,
    _BAD_NUMBER,
    _BAD_TRIPLE,
    _BAD_ID,
    _BAD_VALUE,
    _BAD_COUNT,
) = range(len(RULES))
_COLUMN_RULES = (_SKELETON_COLUMNS, _COMMON_COLUMNS)


@dataclass(frozen=True)
class Selection:
    """Fields to read from a file; a field may be in several lists.

    Args:
        ids: Fields of which one id is kept, the ``S`` columns of ``Lines.ids``.
        values: Fields of which one value is kept, the ``V`` columns of ``Lines.values``.
        bags: Fields of which all triples are kept.
        first: Fields whose first triple counts; for the others, the last does.
    """

    ids: Sequence[str] = ()
    values: Sequence[str] = ()
    bags: Sequence[str] = ()
    first: Collection[str] = ()

    def table(self) -> tuple[npt.NDArray[np.uint64], Int64Array]:
        """Return a hash table: names as integers, and their columns in the three lists, or -1."""
        size = 1 << _TABLE_BITS
        names, columns = np.zeros(size, np.uint64), np.full((size, 3), -1)
        for kind, fields in enumerate((self.ids, self.values, self.bags)):
            for column, field in enumerate(fields):
                name = int.from_bytes(field.encode(), "big")
                place = (name * _MULTIPLIER % 2**64) >> (64 - _TABLE_BITS)
                while names[place] not in (0, name):
                    place = (place + 1) % size
                names[place], columns[place, kind] = name, column
        return names, columns


@dataclass(frozen=True)
class Lines:
    """Parsed content of a block of lines.

    Args:
        labels: Click and conversion, ``(rows, 2)``; zeros for common features.
        index: Common index, uint64 ``(rows,)``.
        ids: ``(rows, S)``, ``MISSING`` where a line lacks the field.
        values: float64 ``(rows, V)``, NaN where a line lacks the field.
        bags: For each field of ``Selection.bags``: lengths ``(rows,)``, ids and weights.
        error: 0 for each good line; for others the index in ``RULES`` of the broken rule.
        where: Offset in the block at which the error begins.
    """

    labels: UInt8Array
    index: npt.NDArray[np.uint64]
    ids: Int32Array
    values: Float64Array
    bags: list[tuple[Int64Array, Int32Array, Float32Array]]
    error: UInt8Array
    where: Int64Array


def parse_lines(block: bytes, selection: Selection, *, skeleton: bool) -> Lines:
    """Parse whole lines, each with its line end; a line that breaks a rule has no bags."""
    rows = count_lines(block)
    lines = Lines(
        labels=np.zeros((rows, 2), np.uint8),
        index=np.zeros(rows, np.uint64),
        ids=np.full((rows, len(selection.ids)), MISSING, np.int32),
        values=np.full((rows, len(selection.values)), np.nan),
        bags=[],
        error=np.zeros(rows, np.uint8),
        where=np.zeros(rows, np.int64),
    )
    most = np.count_nonzero(np.frombuffer(block, np.uint8) == _ID) if selection.bags else 0
    token_columns, token_rows = np.empty(most, np.int8), np.empty(most, np.int64)
    token_ids, token_weights = np.empty(most, np.int32), np.empty(most, np.float32)
    found = _parse(
        np.frombuffer(block, np.uint8),
        skeleton,
        *selection.table(),
        np.array([field in selection.first for field in selection.ids], np.bool_),
        np.array([field in selection.first for field in selection.values], np.bool_),
        lines.labels,
        lines.index,
        lines.ids,
        lines.values,
        token_columns,
        token_rows,
        token_ids,
        token_weights,
        lines.error,
        lines.where,
    )
    for column in range(len(selection.bags)):
        is_field = token_columns[:found] == column
        lengths = np.bincount(token_rows[:found][is_field], minlength=rows)
        lines.bags.append((lengths, token_ids[:found][is_field], token_weights[:found][is_field]))
    return lines


def describe_error(block: bytes, lines: Lines, row: int) -> tuple[str, str]:
    """Return the rule that a line breaks, and the value found."""
    start = int(lines.where[row])
    line = block[start : block.find(b"\n", start)]
    cell = line if lines.error[row] in _COLUMN_RULES else re.split(rb"[\x01-\x03,]", line)[0]
    shown = repr(cell[:40].decode(errors="replace"))
    if lines.error[row] == _BAD_COUNT:
        triples = block[block.find(b",", start) : start + len(line)].count(b"\x02")
        shown = f"{shown} and {triples} triples"
    return RULES[lines.error[row]], shown


@njit(nogil=True, cache=True)
def _parse(  # noqa: C901
    data: Any,
    skeleton: Any,
    names: Any,
    columns: Any,
    first_ids: Any,
    first_values: Any,
    labels: Any,
    index: Any,
    ids: Any,
    values: Any,
    token_columns: Any,
    token_rows: Any,
    token_ids: Any,
    token_weights: Any,
    error: Any,
    where: Any,
) -> Any:
    """Fill the arrays of :class:`Lines`; return the number of tokens."""
    at, tokens = 0, 0
    for row in range(len(error)):
        if skeleton:
            code, at = _parse_labels(data, at, labels[row])
        else:
            code = 0
        if code == 0:
            code, at, index[row] = _parse_index(data, at, skeleton)
        if code == 0:
            before, number_at = tokens, at
            code, at, number = _parse_number(data, at, skeleton)
            if code == 0 and data[at] != _NEWLINE and data[at] != _RETURN:
                code, at, number, tokens = _parse_list(
                    data,
                    at,
                    number,
                    names,
                    columns,
                    first_ids,
                    first_values,
                    ids[row],
                    values[row],
                    token_columns,
                    token_ids,
                    token_weights,
                    tokens,
                )
            if code == 0 and number != 0:
                code, at = _BAD_COUNT, number_at
            if code != 0:
                tokens = before
            token_rows[before:tokens] = row
        if code != 0:
            error[row], where[row] = code, at
        while data[at] != _NEWLINE:
            at += 1
        at += 1
    return tokens


@njit(nogil=True, cache=True)
def _skip_digits(data: Any, at: Any) -> Any:
    while _ZERO <= data[at] <= _ZERO + 9:
        at += 1
    return at


@njit(nogil=True, cache=True)
def _parse_labels(data: Any, at: Any, labels: Any) -> Any:
    """Parse ``sample_id,click,conversion,``; return an error and its (or the next) offset."""
    end = _skip_digits(data, at)
    if data[end] == _NEWLINE:
        return _SKELETON_COLUMNS, at
    if end == at or data[end] != _COMMA:
        return _BAD_SAMPLE, at
    at = end + 1
    for label in range(2):
        if data[at] != _ZERO and data[at] != _ZERO + 1:
            return _BAD_LABEL, at
        if data[at + 1] != _COMMA:
            return _BAD_LABEL, at
        labels[label] = data[at] - _ZERO
        at += 2
    return 0, at


@njit(nogil=True, cache=True)
def _parse_index(data: Any, at: Any, skeleton: Any) -> Any:
    index = np.uint64(0)
    for place in range(at, at + _INDEX_DIGITS):
        digit = data[place]
        if _ZERO <= digit <= _ZERO + 9:
            digit -= _ZERO
        elif 97 <= digit <= 102:
            digit -= 87
        else:
            return _BAD_INDEX, at, index
        index = (index << np.uint64(4)) | np.uint64(digit)
    end = at + _INDEX_DIGITS
    if data[end] == _NEWLINE:
        return _SKELETON_COLUMNS if skeleton else _COMMON_COLUMNS, at, index
    if data[end] != _COMMA:
        return _BAD_INDEX, at, index
    return 0, end + 1, index


@njit(nogil=True, cache=True)
def _parse_number(data: Any, at: Any, skeleton: Any) -> Any:
    end = _skip_digits(data, at)
    if data[end] == _NEWLINE:
        return _SKELETON_COLUMNS if skeleton else _COMMON_COLUMNS, at, 0
    if end == at or end > at + 9 or data[end] != _COMMA:
        return _BAD_NUMBER, at, 0
    number = 0
    for place in range(at, end):
        number = 10 * number + (data[place] - _ZERO)
    return 0, end + 1, number


@njit(nogil=True, cache=True)
def _find(names: Any, name: Any) -> Any:
    """Return the slot of a name in the hash table, or an empty slot."""
    place = np.int64((name * np.uint64(_MULTIPLIER)) >> np.uint64(64 - _TABLE_BITS))
    while names[place] != name and names[place] != 0:
        place = (place + 1) % len(names)
    return place


@njit(nogil=True, cache=True)
def _parse_decimal(data: Any, at: Any) -> Any:
    """Return a decimal number's end, its digits as an integer, and its number of decimals.

    The number of decimals is -1 if the number is absent or has too many digits.
    """
    negative = data[at] == _MINUS
    if negative:
        at += 1
    start, point, mantissa = at, -1, np.uint64(0)
    while True:
        digit = np.uint64(data[at]) - _ZERO_BYTE  # wraps around below zero
        if digit < _TEN:
            mantissa = _TEN * mantissa + digit
        elif data[at] == _POINT and point < 0:
            point = at
        else:
            break
        at += 1
    has_point = point >= 0
    if not 0 < at - start - has_point <= _MOST_DIGITS:
        return at, 0, -1
    decimals = at - point - 1 if has_point else 0
    return at, -np.int64(mantissa) if negative else np.int64(mantissa), decimals


@njit(nogil=True, cache=True)
def _parse_list(  # noqa: C901
    data: Any,
    at: Any,
    number: Any,
    names: Any,
    columns: Any,
    first_ids: Any,
    first_values: Any,
    ids: Any,
    values: Any,
    token_columns: Any,
    token_ids: Any,
    token_weights: Any,
    tokens: Any,
) -> Any:
    """Parse triples to the line's end; return error, offset, ``number`` minus triples, tokens."""
    last, place = np.uint64(0), 0
    while True:
        start = at
        name = np.uint64(0)
        while data[at] > _VALUE and data[at] != _NEWLINE and data[at] != _COMMA:
            name = (name << np.uint64(8)) | np.uint64(data[at])
            at += 1
        if data[at] != _ID or at == start:
            return _BAD_TRIPLE, start, number, tokens
        if at - start > _LONGEST_NAME:
            name = np.uint64(0)
        if name != last:
            last, place = name, _find(names, name)
        at += 1
        start, feature = at, np.uint64(0)
        while True:
            digit = np.uint64(data[at]) - _ZERO_BYTE
            if digit >= _TEN:
                break
            feature = _TEN * feature + digit
            at += 1
        if data[at] == _NEXT or data[at] == _NEWLINE:
            return _BAD_TRIPLE, start, number, tokens
        if not start < at <= start + 10 or data[at] != _VALUE or feature > _LARGEST_ID:
            return _BAD_ID, start, number, tokens
        start = at + 1
        at, mantissa, decimals = _parse_decimal(data, start)
        ends = data[at] == _NEWLINE or (data[at] == _RETURN and data[at + 1] == _NEWLINE)
        if decimals < 0 or not (ends or data[at] == _NEXT):
            return _BAD_VALUE, start, number, tokens
        number -= 1
        if names[place] != 0:
            column = columns[place, 0]
            if column >= 0 and (ids[column] == MISSING or not first_ids[column]):
                ids[column] = feature
            column = columns[place, 1]
            if column >= 0 and (np.isnan(values[column]) or not first_values[column]):
                values[column] = mantissa / _POWERS[decimals]
            column = columns[place, 2]
            if column >= 0:
                token_columns[tokens] = column
                token_ids[tokens] = feature
                token_weights[tokens] = mantissa / _POWERS[decimals]
                tokens += 1
        if ends:
            return 0, at, number, tokens
        at += 1
