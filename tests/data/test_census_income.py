"""Census-Income's two files against a reader that splits them line by line."""

import gzip

import numpy as np
import polars as pl
import pytest

from mtnrec.checks import InputError
from mtnrec.data.census_income import CensusIncome
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_prepared

# Name of each cell, and what the generator writes into it.
CELLS = {
    "age": range(90),
    "class_worker": ["Not in universe", "Private"],
    "det_ind_code": [0, 33],
    "det_occ_code": [0, 2],
    "education": [
        *("Children", "High school graduate", "Some college but no degree"),
        *("Bachelors degree(BA AB BS)", "Doctorate degree(PhD EdD)", "12th grade no diploma"),
    ],
    "wage_per_hour": [0, 0, 1250],
    "hs_college": ["Not in universe", "College or university"],
    "marital_stat": ["Never married", "Widowed", "Married-A F spouse present"],
    "major_ind_code": ["Construction", "Not in universe or children"],
    "major_occ_code": ["Sales", "Precision production craft & repair"],
    "race": ["White", "Amer Indian Aleut or Eskimo"],
    "hisp_origin": ["All other", "NA"],
    "sex": ["Female", "Male"],
    "union_member": ["No", "Yes"],
    "unemp_reason": ["Not in universe"],
    "full_or_part_emp": ["Children or Armed Forces", "Full-time schedules"],
    "capital_gains": [0, 0, 7688],
    "capital_losses": [0, 1902],
    "stock_dividends": [0, 500],
    "tax_filer_stat": ["Nonfiler", "Joint both 65+"],
    "region_prev_res": ["South"],
    "state_prev_res": ["?", "Arkansas"],
    "det_hh_fam_stat": ["Householder", "Spouse of householder"],
    "det_hh_summ": ["Householder", "Spouse of householder"],
    "instance_weight": ["1700.09", "991.95"],
    "mig_chg_msa": ["?", "MSA to MSA"],
    "mig_chg_reg": ["?", "Same county"],
    "mig_move_reg": ["?", "Same county"],
    "mig_same": ["No"],
    "mig_prev_sunbelt": ["?", "Yes"],
    "num_emp": range(7),
    "fam_under_18": ["Not in universe"],
    "country_father": ["United-States", "?"],
    "country_mother": ["United-States"],
    "country_self": ["United-States", "Trinadad&Tobago"],
    "citizenship": ["Native- Born in the United States"],
    "own_or_self": [0, 2],
    "vet_question": ["Not in universe"],
    "vet_benefits": [0, 2],
    "weeks_worked": range(53),
    "year": [94, 95],
    "income": ["- 50000.", "50000+."],
}
NUMERICAL = ["age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends"]
NUMERICAL += ["num_emp", "weeks_worked"]
TELLING = {"marital_stat", "det_hh_fam_stat", "det_hh_summ", "tax_filer_stat"}
COLLEGE = ("Some college", "Associates", "Bachelors", "Masters", "Prof school", "Doctorate")


def write_layout(folder):
    """Write the files as published: cells after a comma and a blank, a full stop at the end."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, rows in (("census-income.data", 200), ("census-income.test", 90)):
        lines = [
            ", ".join(str(rng.choice(list(cells))) for cells in CELLS.values()) for _ in range(rows)
        ]
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def raw(tmp_path):
    return write_layout(tmp_path / "raw")


def read_slowly(path):
    rows = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        rows.append(
            dict(zip(CELLS, (None if cell == "?" else cell for cell in cells), strict=True))
        )
    return rows


def prepare(raw_dir, directory, **keys):
    manifest = CensusIncome(raw_dir=raw_dir, dir=directory, **keys).prepare()
    found, arrays = open_prepared(directory)
    assert found == manifest
    verify_prepared(directory, manifest)
    return manifest, arrays


@pytest.mark.parametrize("preset", ["income", "education"])
def test_equals_a_reader_line_by_line(raw, tmp_path, preset):
    directory = tmp_path / "prepared"

    manifest, arrays = prepare(raw, directory, preset=preset)

    rows = {
        split: read_slowly(raw / f"census-income.{name}")
        for split, name in (("train", "data"), ("test", "test"))
    }
    left_out = TELLING | {"instance_weight", "income"}
    left_out |= {"education", "hs_college"} if preset == "education" else set()
    fields = [name for name in CELLS if name not in (*left_out, *NUMERICAL)]
    assert [field.name for field in manifest.schema.categorical] == fields
    assert manifest.schema.numerical == tuple(NUMERICAL)
    assert not manifest.schema.funnel
    numbers = {
        s: np.array([[float(r[n]) for n in NUMERICAL] for r in of]) for s, of in rows.items()
    }
    mean, deviation = numbers["train"].mean(axis=0), numbers["train"].std(axis=0)
    for split, of_split in rows.items():
        for column, name in enumerate(fields):
            stored = pl.read_parquet(directory / "vocabulary" / f"{name}.parquet")
            indices = dict(zip(stored["value"], stored["index"], strict=True))
            wanted = [indices.get(row[name], 0) for row in of_split]
            assert arrays[split]["categorical"][:, column].tolist() == wanted
            lacking = sum(row[name] is None for row in of_split)
            assert manifest.missing[split].get(name, 0) == lacking
        wanted = (numbers[split] - mean) / deviation
        np.testing.assert_allclose(arrays[split]["numerical"], wanted, atol=1e-5)
        never = [row["marital_stat"] == "Never married" for row in of_split]
        first = [
            row["income"] == "50000+."
            if preset == "income"
            else row["education"].startswith(COLLEGE)
            for row in of_split
        ]
        assert arrays[split]["labels"].tolist() == np.column_stack([first, never]).tolist()
    names = {"income": "income_50k", "education": "college"}
    assert manifest.schema.labels == (names[preset], "never_married")


def test_packed_files_give_the_same_bytes(raw, tmp_path):
    _, expected = prepare(raw, tmp_path / "plain")
    for path in list(raw.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()

    _, arrays = prepare(raw, tmp_path / "packed")

    for split in ("train", "test"):
        for stem, array in expected[split].items():
            np.testing.assert_array_equal(arrays[split][stem], array)


def test_missing_files_are_named_with_the_address(raw, tmp_path):
    (raw / "census-income.test").unlink()
    message = (
        r"raw lacks census-income\.test\. Download .* https://archive\.ics\.uci\.edu/dataset/117"
    )

    with pytest.raises(InputError, match=message):
        prepare(raw, tmp_path / "prepared")
    with pytest.raises(InputError, match=r"data\.raw_dir is not given.*archive\.ics\.uci\.edu"):
        prepare(None, tmp_path / "prepared")


BROKEN = {
    "cells": (lambda line: line + ", more", "expected 42 values, got 43"),
    "income": (lambda line: line[: line.rindex(",")] + ", 60000", "'income': expected a value"),
    "marital": (lambda line: line.replace("Widowed", "Widow"), "'marital_stat': expected a value"),
    "education": (lambda line: line.replace("Children,", "Child,", 1), "'education': expected"),
    "number": (lambda line: "old" + line, "'age': expected a number, got 'old"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_refused_with_its_line_or_skipped_and_counted(
    raw, tmp_path, change, message
):
    path = raw / "census-income.data"
    lines = path.read_text().splitlines()
    line = next(line for line in lines if "Widowed" in line and "Children, " in line[:80])
    path.write_text("\n".join([change(line), *lines]) + "\n")

    with pytest.raises(InputError, match=rf"census-income\.data, line 1.*{message}"):
        prepare(raw, tmp_path / "prepared")
    manifest, _ = prepare(raw, tmp_path / "prepared", on_error="skip")

    assert manifest.rows["train"] == 200
    assert manifest.report["train_rows_skipped"] == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preset": "age"}, "data.preset must be one of income, education; got 'age'"),
        ({"min_count": 0}, "data.min_count must be an integer >= 1, got 0"),
        ({"on_error": "ignore"}, "data.on_error must be one of refuse, skip"),
    ],
)
def test_bad_settings_are_refused(raw, tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        prepare(raw, tmp_path / "prepared", **keys)
