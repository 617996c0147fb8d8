"""KuaiRand: the exposures of a log, joined with the features of their users and videos.

Memory holds the features of all users and videos, about 50 bytes per video; the log is streamed.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl

from mtnrec.arrays import BoolArray, Int64Array
from mtnrec.checks import InputError
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.files import identities
from mtnrec.data.raw.tabular import Chunk, FileSource, RowRules, Source

SIGNALS = (
    *("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate"),
    "is_profile_enter",
)
USER = "user_id"
TIME = "time_ms"
_VIDEO = "video_id"
OF_USER = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range"),
    *("register_days_range", *(f"onehot_feat{number}" for number in range(18))),
)
_OF_VIDEO = ("author_id", "video_type", "upload_type", "music_type")
_TAGS = "tag"  # several per video: "12,65"
_DURATION = "video_duration"  # ms
_UPLOADED = "upload_dt"
_LOG_DURATION = "log_duration"  # log(1 + seconds)
_LOG_AGE = "log_age"  # log(1 + days since the upload)
CATEGORICAL = (USER, _VIDEO, "tab", "hour", "weekday", *OF_USER, *_OF_VIDEO, _TAGS)
NUMERICAL = (_LOG_DURATION, _LOG_AGE)
_DAY = r"^20[0-9]{6}$"
_HOUR_AND_MINUTE = r"^(?:[0-9]|[1-5][0-9]|(?:1?[0-9]|2[0-3])[0-5][0-9])$"
_ID = r"^[0-9]{1,18}$"


class Features:
    """Features of users or videos by id.

    Args:
        key: Column of the id.
        path: A csv file with a header, plain or ``.gz``.
        columns: Other columns that are read.
        compact: Changes the texts of a chunk to smaller types.

    Raises:
        InputError: If a column is missing, or an id is not an integer or occurs twice.
    """

    def __init__(
        self,
        key: str,
        path: Path,
        columns: Sequence[str],
        compact: Callable[[pl.DataFrame], pl.DataFrame],
    ) -> None:
        source = FileSource("data.raw_dir", path, ",", ".")
        source.require_columns("KuaiRand", [key, *columns])
        parts = []
        for chunk in source.chunks([key, *columns], BadRows("refuse")):
            _refuse(chunk, key, _matches(chunk.frame[key], _ID), "an id must be a whole number")
            parts.append(compact(chunk.frame.with_columns(pl.col(key).cast(pl.Int64))))
        frame = pl.concat(parts).sort(key)
        self._ids: Int64Array = frame[key].to_numpy()
        if (twice := np.flatnonzero(self._ids[1:] == self._ids[:-1])).size:
            raise InputError(
                f"{path}: each {key} must have one row, got several of "
                f"{self._ids[twice[0]]}. Download the file again."
            )
        self._frame = frame.drop(key)

    def of(self, ids: Int64Array) -> pl.DataFrame:
        """Return the features of each id; null where an id has none."""
        place = self._ids.searchsorted(ids).clip(max=len(self._ids) - 1)
        found = pl.Series(place).set(pl.Series(self._ids[place] != ids), None)
        return self._frame.select(pl.all().gather(found))


def read_users(path: Path) -> Features:
    """Read the features of all users."""
    return Features(USER, path, OF_USER, lambda frame: frame)


def read_videos(path: Path) -> Features:
    """Read the features of all videos, in types that are smaller than texts."""
    columns = [*_OF_VIDEO, _TAGS, _DURATION, _UPLOADED]

    def compact(frame: pl.DataFrame) -> pl.DataFrame:
        few = [name for name in _OF_VIDEO if name != "author_id"]
        return frame.with_columns(
            pl.col(few).cast(pl.Categorical),
            pl.col("author_id", _DURATION).cast(pl.Float64, strict=False),
            pl.col(_UPLOADED).str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False),
        )

    return Features(_VIDEO, path, columns, compact)


class JoinedLog(Source):
    """The exposures of some days, in the order of the files, with the features of their rows.

    Args:
        name: The split, for messages.
        paths: Csv files with a header, plain or ``.gz``.
        days: First and last day.
        labels: The signals that are read.
        users: Features of the users.
        videos: Features of the videos.

    Raises:
        InputError: If a file cannot be read or lacks a column.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        days: tuple[date, date],
        labels: Sequence[str],
        users: Features,
        videos: Features,
    ) -> None:
        self.path, self.name = paths[0].parent, name
        self.columns, self.index = [*CATEGORICAL, *NUMERICAL, *labels, TIME], []
        self._paths, self._days, self._users, self._videos = paths, days, users, videos
        self._read = [USER, _VIDEO, "date", "hourmin", TIME, "tab", *labels]
        self._logs = [FileSource("data.raw_dir", path, ",", ".") for path in paths]
        for log in self._logs:
            log.require_columns("KuaiRand", self._read)

    def identity(self, checksum: Callable[[Path], str]) -> list[list[str | int]]:
        """Return name, size and SHA-256 of each file."""
        return identities(self._paths, checksum)

    def chunks(
        self,
        columns: list[str],
        bad_rows: BadRows,
        *,
        lists: Sequence[str] = (),
        any_type: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        first = 0
        for log in self._logs:
            for chunk in log.chunks(self._read, bad_rows):
                kept = self._keep(chunk, bad_rows)
                frame = self._join(chunk.frame.filter(kept)).select(columns)
                numbers = chunk.numbers[kept]
                if frame.height:
                    yield Chunk(frame, frame, chunk.path, chunk.unit, numbers, first)
                first += frame.height
        if not first:
            raise InputError(
                f"{self.path}: {self.name} must have rows from {self._days[0]} to "
                f"{self._days[1]}, got none. Download the files again."
            )

    def _keep(self, chunk: Chunk, bad_rows: BadRows) -> BoolArray:
        """Return which rows are valid and of the days, ``(rows,)``."""
        days, rules = _days(chunk.frame), RowRules(chunk, bad_rows)
        for name, pattern, rule in (
            (USER, _ID, "an id must be a whole number"),
            (_VIDEO, _ID, "an id must be a whole number"),
            ("date", _DAY, "a date must be YYYYMMDD"),
            ("hourmin", _HOUR_AND_MINUTE, "an hour must be HHMM"),
        ):
            holds = _matches(chunk.frame[name], pattern)
            if name == "date":
                holds &= days.is_not_null()
            rules.require(name, holds.to_numpy(), rule)
        of_days: BoolArray = days.is_between(*self._days).fill_null(value=False).to_numpy()
        return ~rules.broken & of_days

    def _join(self, frame: pl.DataFrame) -> pl.DataFrame:
        users, videos = (frame[name].cast(pl.Int64).to_numpy() for name in (USER, _VIDEO))
        day = _days(frame)
        joined = pl.concat(
            [frame, self._users.of(users), self._videos.of(videos)], how="horizontal"
        )
        age = (pl.lit(day) - pl.col(_UPLOADED)).dt.total_days()
        return joined.with_columns(
            hour=pl.col("hourmin").cast(pl.Int64) // 100,
            weekday=pl.lit(day).dt.weekday(),
            **{
                _TAGS: pl.col(_TAGS).str.split(","),
                _LOG_DURATION: (pl.col(_DURATION) / 1000).clip(lower_bound=0).log1p(),
                _LOG_AGE: age.clip(lower_bound=0).cast(pl.Float64).log1p(),
            },
        ).with_columns(pl.col(pl.Categorical).cast(pl.String))


def _matches(column: pl.Series, pattern: str) -> pl.Series:
    return column.str.contains(pattern).fill_null(value=False)


def _days(frame: pl.DataFrame) -> pl.Series:
    return frame["date"].str.to_date("%Y%m%d", strict=False)


def _refuse(chunk: Chunk, name: str, holds: pl.Series, rule: str) -> None:
    if not holds.all():
        row = int((~holds).arg_max() or 0)
        raise InputError(
            f"{chunk.place(row)}, column {name!r}: {rule}, got {chunk.frame[name][row]!r}. "
            "Download the file again."
        )
