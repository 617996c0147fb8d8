"""One column of a table: its kind, and its cells as texts, numbers, labels and times.

A missing cell is null, and a cell that cannot be parsed becomes null.
"""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import numpy as np
import polars as pl

from mtnrec.arrays import Float64Array, Int64Array
from mtnrec.checks import InputError

FEWEST_ROWS_OF_AN_ID = 100  # a smaller table can have distinct values by chance
_BLOCK = 4096
# A float holds every whole number of at most so many bits.
_EXACT_BITS: dict[Any, int] = {pl.Float16: 11, pl.Float32: 24, pl.Float64: 53}
_INTEGER = r"^(?:0|-?[1-9][0-9]*)$"
_CODE = r"^0[0-9]"  # a zip code, for example
_DATE = r"^\d{4}-\d{2}-\d{2}(?:[T ]|$)"
_BOOLEAN = r"^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"
# A number as a writer of floats spells it: 3.0, 2.50, 1e+16, 1.5E-7. Of a bare 1e5, which may be a
# code, only the exponents for which floats are written so.
_FRACTION = r"^-?(?:0|[1-9][0-9]*)\.[0-9]*$"
_SCIENTIFIC = (
    r"^-?[1-9](?:\.[0-9]+[eE][+-]?[0-9]{1,3}|[eE][+-][0-9]{1,3}"
    r"|e(?:1[6-9]|[2-9][0-9]|[12][0-9]{2}|30[0-8]))$"
)
_WHOLE = r"^(-?[0-9]+)\.0*$"
_MOMENT = (
    r"^(?<date>\d{4}-\d{2}-\d{2})[T ](?<time>\d{2}:\d{2})(?<second>:\d{2})?(?<fraction>\.\d+)?"
    r" ?(?<zone>Z|UTC|(?<sign>[+-])(?<hours>\d{2}):?(?<minutes>\d{2})?)?$"
)
_RESPELLED = "|".join((_FRACTION, _SCIENTIFIC, _BOOLEAN, "^NaN$", _DATE.replace("|$", "")))
# Spellings that people, not programs, read as a number: 5 with blanks, 1_000, 8,14, 1,000,000,
# 1 000, $5, 5 %.
_NEARLY_NUMBER = (
    r"^\s*[$€£¥]?\s*[+-]?[0-9]+(?:_[0-9]+|,[0-9]+|(?:[, \x{a0}][0-9]{3})*)(?:\.[0-9]+)?"
    r"\s*[%$€£¥]?\s*$"
)
_LABELS = {"0": 0, "false": 0, "1": 1, "true": 1}


def transformed(values: Float64Array, fill: Any, shift: Any, scale: Any) -> Float64Array:
    """Return the stored numbers: NaN becomes ``fill``, then ``(value - shift) / scale``.

    Args:
        values: ``(n,)``, or ``(n, N)`` with ``fill``, ``shift`` and ``scale`` for each column.
        fill: Replaces NaN; NaN keeps missing cells missing.
        shift: Subtracted.
        scale: Divisor.
    """
    return (np.where(np.isnan(values), fill, values) - shift) / scale


class Word(NamedTuple):
    """A cell that is not what most others of its column are.

    Args:
        value: The cell.
        place: Its file and line.
        share: Count of the others, ``59 of 60``.
        kind: Kind of the others, ``number`` or ``date``.
    """

    value: str
    place: str
    share: str
    kind: str


class Profile:
    """Kind and uniqueness of a column, updated chunk by chunk.

    The kind depends on the values, not on the type that stores them: a column of whole numbers is
    ``integer`` as integers, floats, decimals or texts. A text is a number if it is written as one
    (``007`` is not), and a date if it starts with ``YYYY-MM-DD``.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._hashes: list[pl.Series] | None = []
        self._word: dict[str, tuple[str, str]] = {}

    def update(self, column: pl.Series, place: Callable[[int], str]) -> None:
        """Add a chunk; ``place`` describes the place of a row."""
        kinds = _kinds(column)
        present = kinds["present"]
        self._counts.update({kind: int(mask.sum()) for kind, mask in kinds.items()})
        for kind in ("number", "date"):
            if kind not in self._word and (other := present & ~kinds[kind]).any():
                row = int(other.arg_max() or 0)
                self._word[kind] = str(column[row]), place(row)
        if self._hashes is not None:
            is_list = isinstance(column.dtype, pl.List)
            hashes = pl.Series([0, 0]) if is_list else column.filter(present).hash()
            is_unique = hashes.n_unique() == len(hashes)
            self._hashes = [*self._hashes, hashes] if is_unique else None

    @property
    def kind(self) -> str:
        """``integer``, ``number``, ``date``, ``boolean``, ``list``, ``text`` or ``empty``."""
        if not self._counts["present"]:
            return "empty"
        for kind in ("list", "boolean", "integer", "number", "date"):
            is_code = kind in ("integer", "number") and self._counts["code"]
            if self._counts[kind] == self._counts["present"] and not is_code:
                return kind
        return "text"

    @property
    def count(self) -> int:
        """Number of cells that are not missing."""
        return self._counts["present"]

    @property
    def is_unique(self) -> bool:
        """Whether no value occurs twice, as in a row id; never in a small table."""
        if not self._hashes or self.count < FEWEST_ROWS_OF_AN_ID:
            return False
        return pl.concat(self._hashes).n_unique() == self.count

    @property
    def is_inexact(self) -> bool:
        """Whether a float is a whole number so large that its neighbours are the same float."""
        return self._counts["inexact"] > 0

    @property
    def word(self) -> Word | None:
        """First cell that is not a number (or a date) where most are; None if there is none.

        Texts that nearly are numbers, such as ``1_000`` and ``8,14``, count among the most.
        """
        if self.kind != "text":
            return None
        cells = self._counts["present"]
        numbers = 0 if self._counts["code"] else self._counts["number"] + self._counts["nearly"]
        for kind, count in (("number", numbers), ("date", self._counts["date"])):
            if 2 * count > cells:
                return Word(*self._word[kind], f"{count:,} of {cells:,}", kind)
        return None


def _kinds(column: pl.Series) -> dict[str, pl.Series]:
    """Mark the cells of each kind; a cell may be of several."""
    dtype = column.dtype
    present = column.is_not_null()
    if dtype == pl.Boolean:
        return {"present": present, "boolean": present, "number": ~present, "date": ~present}
    if dtype in (pl.Date, pl.Datetime):
        return {"present": present, "number": ~present, "date": present}
    if isinstance(dtype, pl.List):
        return {"present": present, "number": ~present, "date": ~present, "list": present}
    if dtype.is_integer():
        return {"present": present, "integer": present, "number": present, "date": ~present}
    if dtype.is_float():
        whole = (column.floor() == column) & column.is_finite()
        inexact = whole & (column.abs() >= 2.0 ** _EXACT_BITS[dtype])
        kinds = {"present": present, "integer": whole, "number": present, "date": ~present}
        return kinds | {"inexact": inexact}
    text = to_text(column)
    present = text.is_not_null()
    boolean = text.str.contains(_BOOLEAN)
    number = to_numbers(text).is_not_null() & ~boolean
    return {
        "present": present,
        "boolean": boolean,
        "integer": text.str.contains(_INTEGER),
        "number": number,
        "nearly": text.str.contains(_NEARLY_NUMBER) & ~number,
        "code": text.str.contains(_CODE),
        "date": text.str.contains(_DATE),
    }


def to_text(column: pl.Series) -> pl.Series:
    """Convert each cell to its canonical text: one text per value, whatever stores it.

    A number is its digits without zeros at the end (``3`` for 3.0, ``2.5`` for 2.50), so that
    integers, floats, decimals and their texts agree. A boolean is ``true`` or ``false``. A moment
    is ``YYYY-MM-DD HH:MM:SS.f`` in UTC, without a fraction or a time that is zero; one without a
    zone counts as UTC. The text ``NaN`` is missing. Any other text stays, for example ``007``.

    >>> to_text(pl.Series([1.0, 2.5, None])).to_list()
    ['1', '2.5', None]
    >>> to_text(pl.Series(["1.0", "2.50", "1e+16", "007", "True", "1.2.3"])).to_list()
    ['1', '2.5', '10000000000000000', '007', 'true', '1.2.3']
    >>> to_text(pl.Series(["2024-03-01 00:00:00", "2024-03-01T01:30:00.50+01:00"])).to_list()
    ['2024-03-01', '2024-03-01 00:30:00.5']
    """
    if column.dtype == pl.Datetime:
        if cast(pl.Datetime, column.dtype).time_zone is not None:
            column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return _canonical(column.dt.to_string("%Y-%m-%d %H:%M:%S%.f"))
    text = _as_written(column)
    is_canonical = column.dtype.is_integer() or column.dtype in (pl.Boolean, pl.Date)
    return text if is_canonical else _canonical(text)


def to_bags(column: pl.Series) -> tuple[Int64Array, pl.Series]:
    """Return the length of each list, 0 for a missing one, and all their items.

    Raises:
        InputError: If the cells are not lists; they may all be missing.

    >>> lengths, items = to_bags(pl.Series([["a", "b"], None, ["c"]]))
    >>> lengths.tolist(), items.to_list()
    ([2, 0, 1], ['a', 'b', 'c'])
    """
    if column.dtype == pl.Null:
        column = column.cast(pl.List(pl.Null))
    if not isinstance(column.dtype, pl.List):
        raise InputError(
            f"column {column.name!r} must hold lists, since the field is multi-valued, got "
            f"{column.dtype}"
        )
    lengths = column.list.len().fill_null(0).cast(pl.Int64)
    return lengths.to_numpy(), column.filter(lengths > 0).explode()


def _as_written(column: pl.Series) -> pl.Series:
    if column.dtype == pl.Float16:  # polars writes it with the digits of a float32
        texts = column.to_numpy().astype(np.float16).astype(str)
        return pl.Series(texts, dtype=pl.String).set(column.is_null(), None)
    return column.cast(pl.String)


def _canonical(text: pl.Series) -> pl.Series:
    changes = text.str.contains(_RESPELLED)
    if not changes.any():
        return text
    old = text.filter(changes).unique()
    return text.replace(old, _respell(old))


def _respell(text: pl.Series) -> pl.Series:
    """Return the canonical texts of numbers, booleans, moments and NaN."""
    value = pl.col("text")
    is_number = value.str.contains(f"{_FRACTION}|{_SCIENTIFIC}")
    number = value.cast(pl.Float64, strict=False)
    # Digits of any length stay exact; a float is written out where an integer type holds it.
    digits = pl.coalesce(
        value.str.extract(_WHOLE),
        pl.when(number.floor() == number).then(number.cast(pl.Int128, strict=False)),
    )
    number = pl.coalesce(digits.cast(pl.String), number.cast(pl.String))
    is_boolean = value.str.contains(_BOOLEAN)
    frame = text.alias("text").to_frame().with_columns(moment=_moments(text))
    fraction = value.str.extract(r":\d{2}\.(\d+)").str.strip_chars_end("0")
    moment = pl.col("moment").dt.to_string("%Y-%m-%d %H:%M:%S") + pl.when(fraction != "").then(
        "." + fraction
    ).otherwise(pl.lit(""))
    return frame.select(
        pl.when(value == "NaN")
        .then(None)
        .when(is_boolean)
        .then(value.str.to_lowercase())
        .when(is_number)
        .then(pl.when(number == "-0").then(pl.lit("0")).otherwise(number))
        .otherwise(pl.coalesce(moment.str.strip_suffix(" 00:00:00"), value))
    ).to_series()


def _moments(text: pl.Series) -> pl.Series:
    """Parse dates and moments to whole seconds in UTC; others are null."""
    part = pl.col("part").struct.field
    seconds = pl.concat_str(
        part("date"), pl.lit(" "), part("time"), part("second").fill_null(":00")
    ).str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False, time_unit="us")
    days = pl.col("text").str.to_datetime("%Y-%m-%d", strict=False, time_unit="us")
    minutes = 60 * part("hours").cast(pl.Int64) + part("minutes").fill_null("0").cast(pl.Int64)
    offset = pl.when(part("sign") == "-").then(-minutes).otherwise(minutes).fill_null(0)
    frame = text.alias("text").to_frame()
    return (
        frame.with_columns(part=pl.col("text").str.extract_groups(_MOMENT))
        .select(pl.coalesce(seconds - pl.duration(minutes=offset), days))
        .to_series()
    )


def to_numbers(column: pl.Series) -> pl.Series:
    """Parse each cell as float64; NaN stays NaN, true is 1.

    A shorter float or a decimal is the number that is written: 0.1 is 0.1.

    >>> to_numbers(pl.Series(["1e3", ".5", "True", "many", None])).to_list()
    [1000.0, 0.5, 1.0, None, None]
    """
    dtype = column.dtype
    if dtype.is_temporal():  # polars would return days or microseconds
        return pl.repeat(None, len(column), dtype=pl.Float64, eager=True)
    if dtype.is_decimal() or (dtype.is_float() and dtype != pl.Float64):
        column = _as_written(column)
    numbers = column.cast(pl.Float64, strict=False)
    if column.dtype != pl.String or not (boolean := column.str.contains(_BOOLEAN)).any():
        return numbers
    words = column.str.to_lowercase() == "true"
    return numbers.zip_with(~boolean.fill_null(value=False), words.cast(pl.Float64))


def to_labels(column: pl.Series, positive: Collection[str] | None = None) -> pl.Series:
    """Parse labels: 0, 1, true and false, or whether the value is one of ``positive``.

    Args:
        column: The cells.
        positive: Canonical texts of the values that count as 1, in lower case; all others are 0.

    >>> to_labels(pl.Series(["1.0", "False", "yes", None])).to_list()
    [1, 0, None, None]
    >>> to_labels(pl.Series(["Yes", "no", None]), ["yes"]).to_list()
    [1, 0, None]
    """
    text = to_text(column).str.to_lowercase()
    if positive is not None:
        return text.is_in(list(positive)).cast(pl.UInt8)
    return text.replace_strict(_LABELS, default=None, return_dtype=pl.UInt8)


def to_times(column: pl.Series, kind: str) -> pl.Series:
    """Convert integers, numbers or dates to numbers in the same order; dates to microseconds.

    >>> days = pl.Series(["1970-01-01", "1970-01-01 00:00:01.5", "1970-01-02T01:00:00+01:00"])
    >>> to_times(days, "date").to_list()
    [0, 1500000, 86400000000]
    """
    if kind == "integer":
        return to_text(column).cast(pl.Int64, strict=False)
    if kind == "number":
        numbers = to_numbers(column)
        return numbers.set(~numbers.is_finite(), None)
    if column.dtype == pl.String:
        fraction = column.str.extract(r":\d{2}\.(\d{1,6})").fill_null("0").str.pad_end(6, "0")
        return _moments(column).dt.epoch("us") + fraction.cast(pl.Int64)
    if column.dtype not in (pl.Date, pl.Datetime):
        return pl.repeat(None, len(column), dtype=pl.Int64, eager=True)
    return column.dt.epoch("us")


class Moments:
    """Mean and standard deviation of columns, in float64; a missing cell (NaN) counts as the mean.

    Rows are summed in blocks of a fixed length, so that the result is the same to the bit however
    a file is split into chunks.
    """

    def __init__(self, columns: int) -> None:
        self._mean = np.zeros(columns)
        self._rows = 0
        self._count = np.zeros(columns)
        self._squares = np.zeros(columns)
        self._lowest = np.full(columns, np.inf)
        self._highest = np.full(columns, -np.inf)
        self._rest = np.empty((0, columns))

    def update(self, values: Float64Array) -> None:
        """Add rows, ``(rows, columns)``."""
        rows = np.concatenate([self._rest, values])
        whole = len(rows) - len(rows) % _BLOCK
        for start in range(0, whole, _BLOCK):
            self._add(rows[start : start + _BLOCK])
        self._rest = rows[whole:]

    def finish(self) -> None:
        """Add the remaining rows."""
        self._add(self._rest)
        self._rest = self._rest[:0]

    @property
    def mean(self) -> Float64Array:
        """Mean; of a constant column its value, to the bit."""
        return np.where(self._lowest == self._highest, self._lowest, self._mean)

    @property
    def scale(self) -> Float64Array:
        """Standard deviation; 1 for a column that is constant up to rounding."""
        variance = self._squares / max(self._rows, 1)
        epsilon = np.finfo(np.float64).eps
        rounding = (self._rows * self._mean * epsilon) ** 2 + self._rows * variance * epsilon
        return np.where(variance <= rounding, 1.0, np.sqrt(variance))

    def _add(self, block: Float64Array) -> None:
        # Update of mean and sum of squares by those of a block: Chan, Golub and LeVeque (1983).
        present = ~np.isnan(block)
        count = present.sum(axis=0)
        mean = np.where(present, block, 0).sum(axis=0) / count.clip(min=1)
        squares = (np.where(present, block - mean, 0) ** 2).sum(axis=0)
        total = self._count + count
        difference = mean - self._mean
        self._mean = self._mean + difference * count / total.clip(min=1)
        between = difference**2 * self._count * count / total.clip(min=1)
        self._squares = self._squares + squares + between
        self._lowest = np.fmin(self._lowest, np.fmin.reduce(block, axis=0, initial=np.inf))
        self._highest = np.fmax(self._highest, np.fmax.reduce(block, axis=0, initial=-np.inf))
        self._count = total
        self._rows += len(block)
