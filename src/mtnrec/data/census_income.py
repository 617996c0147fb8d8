"""Census-Income (KDD) of UCI, the data of the MMoE paper: a survey of 1994 and 1995."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mtnrec.checks import InputError, check_choice, check_integer
from mtnrec.data.datamodule import DataModule
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.files import find_one, list_files, raw_identity, require_raw_dir

_FILES = {"train": "census-income.data", "test": "census-income.test"}


@dataclass(kw_only=True, eq=False, repr=False)
class CensusIncome(DataModule):
    """Two independent tasks on a row per person (J. Ma et al., KDD 2018, section 6.2).

    The instance weight is not a feature, nor is what names the marital status: household and family
    status, household summary, tax filer status. With ``education`` neither are the income and the
    enrolment in a school.

    Args:
        preset: ``income``, whether the income is above 50,000 dollars, or ``education``, whether it
            is at least some college; the other task is whether the person was never married.
        raw_dir: Folder with ``census-income.data`` and ``census-income.test``, plain or ``.gz``;
            only ``prepare`` needs it. Given to training, they must be those that the set was
            prepared from.
        min_count: Minimum number of training rows with a categorical value to give it an index.
        on_error: ``refuse`` a row that breaks the format, or ``skip`` and count such rows.
    """

    origin: ClassVar[str] = (
        "Download Census-Income (KDD) from https://archive.ics.uci.edu/dataset/117 (free, without "
        "an account): census-income.data and census-income.test, plain or .gz."
    )

    name: str = "census_income"
    preset: str = "income"
    raw_dir: str | Path | None = None
    min_count: int = 1
    on_error: str = "refuse"

    def __post_init__(self) -> None:
        check_choice("data.preset", self.preset, ["income", "education"])
        super().__post_init__()
        check_integer("data.min_count", self.min_count, minimum=1)
        check_choice("data.on_error", self.on_error, BadRows.CHOICES)

    @property
    def _folder_name(self) -> str:
        return f"{self.name}-{self.preset}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that determine the prepared data set, and the identity of the raw files."""
        raw = raw_identity(self.raw_dir, lambda path: list(_find(path).values()), self._checksum)
        return {key: getattr(self, key) for key in ("preset", "min_count", "on_error")} | raw

    def prepare(self) -> Manifest:
        """Read the two files three times, in bounded memory, and write the prepared data set.

        Raises:
            InputError: If ``raw_dir`` is not given or lacks a file, or a file breaks the format.
        """
        # Imported here: training needs no polars, whose import takes 0.1 s.
        from mtnrec.data.preparation import census_income
        from mtnrec.data.preparation.table import TableSettings, prepare_tables

        files = _find(require_raw_dir(self.raw_dir, self.origin))
        labels = list(census_income.LABELS[self.preset])
        return prepare_tables(
            self.folder,
            TableSettings(
                name=self.name,
                parameters=self.parameters,
                named={"data.labels": labels},
                labels=labels,
                categorical=census_income.categorical_columns(self.preset),
                numerical=list(census_income.NUMERICAL),
                min_count=self.min_count,
                on_error=self.on_error,
            ),
            {split: census_income.CensusFile(path) for split, path in files.items()},
        )


def _find(raw_dir: Path) -> dict[str, Path]:
    """Find the two files by name.

    Raises:
        InputError: If one is missing, or there several times.
    """
    files = list_files(raw_dir)
    found = {split: find_one(files, [name, f"{name}.gz"]) for split, name in _FILES.items()}
    if missing := [_FILES[split] for split, path in found.items() if path is None]:
        raise InputError(f"{raw_dir} lacks {', '.join(missing)}. {CensusIncome.origin}")
    return {split: path for split, path in found.items() if path is not None}
