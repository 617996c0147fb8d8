"""UCI's Census-Income (KDD): lines of 42 cells without a header, as rows with labels."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from mtnrec.arrays import BoolArray
from mtnrec.data.raw.archives import open_plain
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import read_blocks
from mtnrec.data.raw.files import identities
from mtnrec.data.raw.progress import ReadProgress
from mtnrec.data.raw.tabular import Chunk, RowRules, Source, split_lines

_INCOME, _MARITAL, _EDUCATION = "income", "marital_stat", "education"
_WEIGHT = "instance_weight"  # of the person in the population, no property of a person
_CELLS = (
    *("age", "class_worker", "det_ind_code", "det_occ_code", _EDUCATION, "wage_per_hour"),
    *("hs_college", _MARITAL, "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex"),
    *("union_member", "unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses"),
    *("stock_dividends", "tax_filer_stat", "region_prev_res", "state_prev_res"),
    *("det_hh_fam_stat", "det_hh_summ", _WEIGHT, "mig_chg_msa", "mig_chg_reg", "mig_move_reg"),
    *("mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father"),
    *("country_mother", "country_self", "citizenship", "own_or_self", "vet_question"),
    *("vet_benefits", "weeks_worked", "year", _INCOME),
)
# Names the marital status: "child 18+ never married", "spouse of householder", "joint both 65+".
_TELLS_MARITAL = (_MARITAL, "det_hh_fam_stat", "det_hh_summ", "tax_filer_stat")
_TELLS_EDUCATION = (_EDUCATION, "hs_college")  # enrolled in high school, or in a college
_INCOMES = {"- 50000.": 0, "50000+.": 1}
_COLLEGE = (
    *("Some college but no degree", "Associates degree-occup /vocational"),
    *("Associates degree-academic program", "Bachelors degree(BA AB BS)"),
    *("Masters degree(MA MS MEng MEd MSW MBA)", "Prof school degree (MD DDS DVM LLB JD)"),
    "Doctorate degree(PhD EdD)",
)
_EDUCATIONS = (
    *("Children", "Less than 1st grade", "1st 2nd 3rd or 4th grade", "5th or 6th grade"),
    *("7th and 8th grade", "9th grade", "10th grade", "11th grade", "12th grade no diploma"),
    *("High school graduate", *_COLLEGE),
)
_NEVER = "Never married"
_MARITALS = (
    *(_NEVER, "Married-civilian spouse present", "Married-spouse absent", "Separated", "Divorced"),
    *("Widowed", "Married-A F spouse present"),
)
LABELS = {
    "income": ("income_50k", "never_married"),
    "education": ("college", "never_married"),
}
_LEFT_OUT = {
    "income": (_INCOME, _WEIGHT, *_TELLS_MARITAL),
    "education": (_INCOME, _WEIGHT, *_TELLS_MARITAL, *_TELLS_EDUCATION),
}
NUMERICAL = (
    *("age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp"),
    "weeks_worked",
)


def categorical_columns(preset: str) -> list[str]:
    """Return the categorical features of a pair of tasks."""
    return [name for name in _CELLS if name not in (*NUMERICAL, *_LEFT_OUT[preset])]


class CensusFile(Source):
    """One of the two files, with the labels as columns of 0 and 1.

    Args:
        path: The file, plain or ``.gz``.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        labels = dict.fromkeys(name for names in LABELS.values() for name in names)
        self.columns, self.index = [*_CELLS, *labels], []

    def identity(self, checksum: Callable[[Path], str]) -> list[list[str | int]]:
        """Return name, size and SHA-256."""
        return identities([self.path], checksum)

    def chunks(
        self,
        columns: list[str],
        bad_rows: BadRows,
        *,
        lists: Sequence[str] = (),
        any_type: Sequence[str] = (),
    ) -> Iterator[Chunk]:
        first = 0
        with open_plain(self.path, ReadProgress()) as stream:
            for block in read_blocks(stream, str(self.path)):
                lines = split_lines(block)
                numbers = np.arange(block.first_line, block.first_line + len(lines))
                lines, numbers = lines.filter(blank := lines != ""), numbers[blank.to_numpy()]
                widths = lines.str.count_matches(",", literal=True) + 1
                fits = widths == len(_CELLS)
                for row in (~fits).arg_true():
                    place = f"{self.path}, line {numbers[row]}"
                    bad_rows.add(place, f"expected {len(_CELLS)} values", str(widths[row]))
                frame, numbers = _cells(lines.filter(fits)), numbers[fits.to_numpy()]
                chunk = Chunk(frame, frame, self.path, "line", numbers, first)
                known = _known(chunk, bad_rows)
                frame = _with_labels(frame.filter(known)).select(columns)
                if frame.height:
                    yield Chunk(frame, frame, self.path, "line", numbers[known], first)
                first += frame.height


def _cells(lines: pl.Series) -> pl.DataFrame:
    """Split lines into cells without blanks; ``?`` is missing."""
    cells = lines.str.split_exact(",", len(_CELLS) - 1).struct.rename_fields(list(_CELLS))
    text = pl.all().str.strip_chars()
    return cells.struct.unnest().with_columns(pl.when(text != "?").then(text).name.keep())


def _known(chunk: Chunk, bad_rows: BadRows) -> BoolArray:
    """Return which rows have an income, marital status and education of the survey, ``(rows,)``."""
    rules = RowRules(chunk, bad_rows)
    for name, values in ((_INCOME, _INCOMES), (_MARITAL, _MARITALS), (_EDUCATION, _EDUCATIONS)):
        holds = chunk.frame[name].is_in(list(values)).fill_null(value=False)
        rules.require(name, holds.to_numpy(), "expected a value of the survey")
    return ~rules.broken


def _with_labels(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(
        income_50k=pl.col(_INCOME).replace_strict(_INCOMES, return_dtype=pl.Int8),
        never_married=(pl.col(_MARITAL) == _NEVER).cast(pl.Int8),
        college=pl.col(_EDUCATION).is_in(_COLLEGE).cast(pl.Int8),
    )
