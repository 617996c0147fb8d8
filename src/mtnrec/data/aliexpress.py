"""AliExpress search logs (P. Li et al., CIKM 2020), from the layout that MTReclib makes of them.

``train.csv`` and ``test.csv`` have a header and 82 columns: ``search_id``, 16 categorical features
(small integers), 63 numerical features in [0, 1], ``click`` and ``conversion``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mtnrec.checks import InputError, check_choice
from mtnrec.data.datamodule import DataModule
from mtnrec.data.delimited import read_delimited, refuse_rows
from mtnrec.data.store import Arrays, Manifest
from mtnrec.data.vocabulary import ValueCounts, encode_in_place
from mtnrec.data.writer import write_prepared
from mtnrec.schema import Schema

CATEGORICAL = tuple(f"categorical_{i}" for i in range(1, 17))
NUMERICAL = tuple(f"numerical_{i}" for i in range(1, 64))
LABELS = ("click", "conversion")

_TYPES = {
    "search_id": pl.Int64,
    **dict.fromkeys(CATEGORICAL, pl.Int32),
    **dict.fromkeys(NUMERICAL, pl.Float64),
    **dict.fromkeys(LABELS, pl.Int64),
}
_SPLITS = ("train", "test")


@dataclass(kw_only=True, eq=False, repr=False)
class AliExpress(DataModule):
    """One country of the AliExpress data set.

    The search id becomes the group, never a feature: it restarts in the test file.

    Args:
        raw_dir: Folder with ``train.csv`` and ``test.csv``; only ``prepare`` needs it.
        conversion_without_click: ``refuse`` such a row, or ``drop`` and count it.
    """

    origin: ClassVar[str] = (
        "The raw logs are Tianchi data set 74690 (https://tianchi.aliyun.com/dataset/74690); the "
        "train.csv and test.csv that MTReclib shares are read as they are."
    )

    raw_dir: str | Path | None
    conversion_without_click: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(
            "data.conversion_without_click", self.conversion_without_click, ["refuse", "drop"]
        )

    def prepare(self) -> Manifest:
        """Read both files once, in bounded memory, and write the prepared data set.

        Raises:
            InputError: If ``raw_dir`` is not given, or a file in it breaks the format.
        """
        if self.raw_dir is None:
            raise InputError(
                "data.raw_dir is not given: name the folder with train.csv and test.csv, "
                f"`data.raw_dir=DIR`. {self.origin}"
            )
        counts = [ValueCounts() for _ in CATEGORICAL]
        dropped = {}
        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,} rows"))
        with (
            write_prepared(Path(self.dir), _SPLITS) as writer,
            Progress(*columns, TimeElapsedColumn()) as progress,
        ):
            for split in _SPLITS:
                path = Path(self.raw_dir) / f"{split}.csv"
                bar = progress.add_task(f"{path.name}:", total=None)
                dropped[split] = 0
                for line, frame in read_delimited(path, _TYPES):
                    arrays = self._convert(path, line, frame)
                    dropped[split] += frame.height - len(arrays["labels"])
                    writer.append(split, arrays)
                    if split == "train":
                        for column, values in enumerate(counts):
                            values.update(arrays["categorical"][:, column])
                    progress.advance(bar, frame.height)
            vocabularies = [values.vocabulary() for values in counts]
            fields = encode_in_place(writer, _SPLITS, CATEGORICAL, vocabularies)
            return writer.finish(
                source=self.name,
                parameters={"conversion_without_click": self.conversion_without_click},
                schema=Schema(fields, NUMERICAL, LABELS, funnel=True),
                report={f"{s}_conversions_without_click": n for s, n in dropped.items()},
            )

    def _convert(self, path: Path, line: int, frame: pl.DataFrame) -> Arrays:
        labels = frame.select(LABELS).to_numpy()
        refuse_rows(
            path, line, ((labels != 0) & (labels != 1)).any(axis=1), "labels must be 0 or 1", labels
        )
        values = frame.select(NUMERICAL).to_numpy()
        with np.errstate(over="ignore"):
            numerical = values.astype(np.float32)
        for column, name in enumerate(NUMERICAL):
            infinite = ~np.isfinite(numerical[:, column])
            refuse_rows(path, line, infinite, f"{name} must be finite", values[:, column])
        orphan = labels[:, 1] > labels[:, 0]
        if self.conversion_without_click == "refuse":
            rule = (
                "a conversion needs a click (data.conversion_without_click=drop drops and counts "
                "such rows)"
            )
            refuse_rows(path, line, orphan, rule, labels)
        arrays = {
            "categorical": frame.select(CATEGORICAL).to_numpy(),
            "numerical": numerical,
            "labels": labels.astype(np.uint8),
            "group": frame["search_id"].to_numpy(),
        }
        return {stem: array[~orphan] for stem, array in arrays.items()}
