"""KuaiRand (C. Gao et al., CIKM 2022): exposures of Kuaishou's short videos, some of them random.

The last days of the log of the app's own recommender are the test set ``test``. The exposures that
were drawn at random are the second test set, ``test_random``: on it a model is measured without the
selection of the recommender that its training rows come from.
"""

from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mtnrec.checks import InputError, check_choice, check_flag, check_integer
from mtnrec.data.datamodule import DataModule
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.files import (
    check_disk_space,
    find_one,
    list_files,
    raw_identity,
    require_raw_dir,
)
from mtnrec.schema import Schema

PRESETS = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}
_FIRST_DAY, _SECOND_LOG, _LAST_DAY = date(2022, 4, 8), date(2022, 4, 22), date(2022, 5, 8)
_MOST_TEST_DAYS = 17  # of the second log, which the random one covers
_ENDS = (".csv", ".csv.gz")
_PREPARED_BYTES_PER_TEXT_BYTE = 2.5  # to estimate the disk space needed


@dataclass(kw_only=True, eq=False, repr=False)
class KuaiRand(DataModule):
    """KuaiRand-Pure, -1K or -27K, split by day.

    Features are user and video id, the user's features (ranges in place of numbers), author, type,
    music type, tags, duration and age of the video, scenario (``tab``), hour and weekday. What is
    known only after the exposure is left out: play and stay times, the other signals, the status of
    the video, and the statistics of the videos, which cover the days of the log. The user id is the
    group as well. The rows of each split are in the order of time.

    Args:
        preset: ``pure``, ``1k`` or ``27k``.
        raw_dir: Folder with the unpacked csv files, plain or ``.gz``; only ``prepare`` needs it.
            Given to training, its files must be those that the set was prepared from.
        labels: Signals to predict: ``is_click``, ``long_view``, ``is_like``, ``is_follow``,
            ``is_comment``, ``is_forward``, ``is_hate``, ``is_profile_enter``.
        funnel: Whether each label requires the one before it. A label without the one before it,
            as a long view without a click, then counts as none; such rows are counted.
        test_days: Number of last days in the test set, from 1 to 17.
        random_days: ``test``, the random exposures of the test days, or ``all``, also those of days
            whose other exposures are training rows.
        exclude: Features to leave out.
        min_count: Minimum number of training rows with a categorical value to give it an index.
        on_error: ``refuse`` a row that breaks the format, or ``skip`` and count such rows.
    """

    origin: ClassVar[str] = (
        "Download and unpack KuaiRand-Pure.tar.gz, KuaiRand-1K.tar.gz or KuaiRand-27K.tar.gz from "
        "https://zenodo.org/records/10439422 (free, without an account)."
    )

    name: str = "kuairand"
    preset: str = "pure"
    raw_dir: str | Path | None = None
    labels: list[str] = field(default_factory=lambda: ["is_click", "long_view"])
    funnel: bool = True
    test_days: int = 7
    random_days: str = "test"
    exclude: list[str] = field(default_factory=list)
    min_count: int = 1
    on_error: str = "refuse"
    validation_split: str = "last"

    def __post_init__(self) -> None:
        check_choice("data.preset", self.preset, list(PRESETS))
        super().__post_init__()
        check_flag("data.funnel", self.funnel)
        check_integer("data.test_days", self.test_days, minimum=1, maximum=_MOST_TEST_DAYS)
        check_choice("data.random_days", self.random_days, ["test", "all"])
        check_integer("data.min_count", self.min_count, minimum=1)
        check_choice("data.on_error", self.on_error, BadRows.CHOICES)
        Schema((), (), tuple(self.labels), self.funnel)  # raises on a wrong number of labels

    @property
    def _folder_name(self) -> str:
        return f"{self.name}-{self.preset}"

    def _how_to_prepare(self) -> str:
        return (
            f"Then: python -m mtnrec.prepare data=kuairand data.preset={self.preset} "
            "data.raw_dir=DIR"
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the prepared data set, and the identity of the raw files."""
        keys = ["preset", "labels", "funnel", "test_days", "random_days", "exclude"]
        keys += ["min_count", "on_error"]
        raw = raw_identity(self.raw_dir, lambda path: _find(path, self.preset).all, self._checksum)
        return {key: getattr(self, key) for key in keys} | raw

    def prepare(self) -> Manifest:
        """Join and write the logs, which are read three times.

        Memory holds the features of users and videos, the vocabularies, and 17 bytes per row.

        Raises:
            InputError: If ``raw_dir`` is not given or lacks a file, the disk is too small, or a
                file breaks the format.
        """
        # Imported here: training needs no polars, whose import takes 0.1 s.
        from mtnrec.data.preparation import kuairand
        from mtnrec.data.preparation.table import TableSettings, prepare_tables

        for label in self.labels:
            check_choice("data.labels", label, kuairand.SIGNALS)
        features = (*kuairand.CATEGORICAL, *kuairand.NUMERICAL)
        for name in self.exclude:
            check_choice("data.exclude", name, features)
        files = _find(require_raw_dir(self.raw_dir, self.origin), self.preset)
        check_disk_space(files.logs, self.folder, _PREPARED_BYTES_PER_TEXT_BYTE)
        users, videos = kuairand.read_users(files.users), kuairand.read_videos(files.videos)
        test = _LAST_DAY - timedelta(days=self.test_days - 1)
        random = test if self.random_days == "test" else _SECOND_LOG
        logs = {
            "train": ([*files.first, *files.second], _FIRST_DAY, test - timedelta(days=1)),
            "test": (files.second, test, _LAST_DAY),
            "test_random": (files.random, random, _LAST_DAY),
        }
        sources = {
            split: kuairand.JoinedLog(split, paths, (first, last), self.labels, users, videos)
            for split, (paths, first, last) in logs.items()
        }
        return prepare_tables(
            self.folder,
            TableSettings(
                name=self.name,
                parameters=self.parameters,
                named={
                    "data.labels": self.labels,
                    "data.group": [kuairand.USER],
                    "data.time": [kuairand.TIME],
                },
                labels=self.labels,
                funnel=self.funnel,
                categorical=[name for name in kuairand.CATEGORICAL if name not in self.exclude],
                numerical=[name for name in kuairand.NUMERICAL if name not in self.exclude],
                group=kuairand.USER,
                time=kuairand.TIME,
                fill="mean",
                min_count=self.min_count,
                conversion_without_click="clear",
                on_error=self.on_error,
            ),
            sources,
        )


class _Files(NamedTuple):
    """Raw files: the logs of the first and the second period, and of the random exposures."""

    first: list[Path]
    second: list[Path]
    random: list[Path]
    users: Path
    videos: Path

    @property
    def logs(self) -> list[Path]:
        """The three logs."""
        return [*self.first, *self.second, *self.random]

    @property
    def all(self) -> list[Path]:
        """All files."""
        return [*self.logs, self.users, self.videos]


def _find(raw_dir: Path, preset: str) -> _Files:
    """Find the raw files by name; a log may be in parts, as those of 27k are.

    Raises:
        InputError: If a file is missing, or there several times.
    """
    files = list_files(raw_dir)
    stems = [
        *("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08", "log_random_4_22_to_5_08"),
        *("user_features", "video_features_basic"),
    ]
    found = {stem: _parts(files, f"{stem}_{preset}") for stem in stems}
    if missing := [f"{stem}_{preset}.csv" for stem, paths in found.items() if not paths]:
        raise InputError(
            f"{raw_dir} lacks {', '.join(missing)} of {PRESETS[preset]}. {KuaiRand.origin}"
        )
    first, second, random, users, videos = found.values()
    return _Files(first, second, random, users[0], videos[0])


def _parts(files: dict[str, list[Path]], stem: str) -> list[Path]:
    """Return the one file of a stem, or its parts in order."""
    if (whole := find_one(files, [f"{stem}{end}" for end in _ENDS])) is not None:
        return [whole]
    parts: list[Path] = []
    while part := find_one(files, [f"{stem}_part{len(parts) + 1}{end}" for end in _ENDS]):
        parts.append(part)
    return parts
