"""The record of a run: written by training, read by everything else."""

import dataclasses
import json
import re

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

    with pytest.raises(InputError, match=r"result\.json is not (valid JSON|a JSON object)"):
        RunRecord.read(path)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(InputError, match=r"result\.json is missing\. Run again\."):
        RunRecord.read(tmp_path / RECORD_FILE)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    return value


ODD = {
    "seed": ["0", 0.5, True, None, [0], 10**30],
    "cell": [1, None, ["a"]],
    "config": [[], "a", None],
    "config.data": [[], 1],
    "config.data.name": [1, None, ["a"]],
    "config.data.batch_size": [nested(60), nested(400), 10**30, "\ud800"],
    "config.model._target_": ["Net", "", 1, None, []],
    "config.mtn.enabled": ["true", 1, None, []],
    "config.mtn.lam": ["high", [1], {}],
    "config.noise.proportion": ["0.1", None, [0]],
    "config.trainer": [[], 1, None],
    "data": [[], 1],
    "data.checksum": [None, 7],
    "data.parameters": [[], "a"],
    "data.rows.test": ["600", -0.5, None],
    "data.suspected_leaks": [[1], [{"feature": "a"}], {"a": 1}],
    "noise.checksum": [1, []],
    "best_epoch": ["2", 2.5, None],
    "metrics": [[], {"test/ctr_auc": "0.7"}, {"test/ctr_auc": [0.7]}, {"test/ctr_auc": True}],
    "counts": [[], {"test/ctr": 7}, {"test/ctr": {"rows": 7}}, {"test/ctr": {"rows": "7"}}],
    "history": [{}, [1], [{"epoch": 0}], [{"epoch": 0, "step": "1"}], None],
    "calibration_curves": [[], {"test/ctr": []}, {"test/ctr": {"predicted": [1]}}],
    "expert_distances": [[1], [[1, 2]], [[0, 1], [0]], "a", {}],
    "seconds": [[], {"fit": "1"}, {}],
    "samples_per_second": [[1], {"train": None}],
    "peak_memory_bytes": ["1", 1.5],
    "parameters": [[], 7, {"network": "7"}, {"network": 7.5}],
    "keys_of_seed": ["seed", [1], {}],
    "versions": [[], {"torch": 2}],
    "format_version": ["1", [1]],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, found in ODD.items() for v in found])
def test_a_record_of_another_shape_is_refused(key, value, path):
    def change(content):
        *parents, last = key.split(".")
        for parent in parents:
            content = content[parent]
        content[last] = value

    edit(path, change)

    with pytest.raises(
        InputError, match=r"run/result\.json (is not the rec|lacks the k|has format)"
    ):
        RunRecord.read(path)


def test_the_message_names_key_rule_and_remedy(path):
    edit(path, lambda content: content["metrics"].update({"test/ctr_auc": "high"}))

    with pytest.raises(
        InputError,
        match=r"result\.json is not the record of a run of mtnrec \(metrics\.test/ctr_auc: Input "
        r"should be a valid number\)\. Delete it and run again",
    ):
        RunRecord.read(path)


def test_numbers_that_are_not_finite_are_refused(path):
    path.write_text(re.sub(r'"best_epoch": \d+', '"best_epoch": 1e999', path.read_text()))

    with pytest.raises(InputError, match="a number is not finite"):
        RunRecord.read(path)
