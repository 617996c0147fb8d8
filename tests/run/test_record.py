"""The record of a run: written by training, read by everything else."""

import dataclasses
import json

import pytest

from mtnrec.checks import InputError
from mtnrec.run.record import RECORD_FILE, RunRecord

REQUIRED = [
    field.name
    for field in dataclasses.fields(RunRecord)
    if field.default is field.default_factory is dataclasses.MISSING
]


@pytest.fixture
def path(tmp_path, write_run):
    return write_run(tmp_path, "run", mtn=True) / RECORD_FILE


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_written_record_is_read_back_unchanged(path, tmp_path):
    record = RunRecord.read(path)

    record.write(tmp_path)

    assert RunRecord.read(tmp_path / RECORD_FILE) == record


def test_nan_is_written_as_null(path, tmp_path):
    record = RunRecord.read(path)
    metrics = {**record.metrics, "test/cvr_auc": float("nan")}

    dataclasses.replace(record, metrics=metrics).write(tmp_path)

    assert RunRecord.read(tmp_path / RECORD_FILE).metrics["test/cvr_auc"] is None


def test_a_record_of_0_1_is_read(path):
    def age(content):
        for key in ("format_version", "keys_of_seed"):
            content.pop(key, None)

    edit(path, age)

    record = RunRecord.read(path)

    assert record.keys_of_seed == ["seed", "data.seed"]
    assert record.format_version == 1


def test_a_later_format_is_refused(path):
    edit(path, lambda content: content.update(format_version=9))

    with pytest.raises(InputError, match=r"format version 9, this version of mtnrec reads 1"):
        RunRecord.read(path)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_required_key_that_is_missing_is_named(key, path):
    edit(path, lambda content: content.pop(key))

    with pytest.raises(InputError, match=rf"result\.json lacks the key {key},"):
        RunRecord.read(path)


def test_a_key_unknown_to_this_version_is_ignored(path):
    before = RunRecord.read(path)
    edit(path, lambda content: content.update(colour="blue"))

    assert RunRecord.read(path) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_damaged_record_is_refused(text, path):
    path.write_text(text, encoding="latin-1")

    with pytest.raises(InputError, match=r"result\.json (is not valid JSON|lacks the key cell)"):
        RunRecord.read(path)
