"""The report of a prepared set: what is printed is written, and says what the set holds."""

import dataclasses

import numpy as np
import pytest

from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.inspection.layout import render_summary
from mtnrec.inspection.leaks import check_leaks
from mtnrec.inspection.statistics import count_split
from mtnrec.schema import CategoricalField, Schema


def cells(report, *names):
    """The numbers of the lines that start with ``names``, split at blanks."""
    lines = [line.split() for line in report.splitlines()]
    return [line[len(names) :] for line in lines if line[: len(names)] == list(names)]


def describe_tiny(directory):
    manifest, arrays = open_prepared(directory)
    rows = np.arange(manifest.rows["train"])
    leaks = check_leaks(arrays["train"], rows, manifest.schema)
    statistics = {split: count_split(arrays[split], manifest.schema) for split in arrays}
    return lambda **changes: render_summary(
        directory, dataclasses.replace(manifest, **changes), statistics, leaks, {}
    )


def test_the_printed_report_is_written_next_to_the_prepared_folder(describe, tmp_path, capsys):
    describe("data=synthetic", "data.rows=3000", f"data.dir={tmp_path / 'sets' / 'log'}")

    printed, out = capsys.readouterr().out, tmp_path / "sets" / "log.txt"
    report = out.read_text()
    assert printed == f"{report}\nThe report is {out}\n"
    assert max(map(len, report.splitlines())) <= 80 + len(str(tmp_path))
    assert report.startswith(f"synthetic, prepared in {tmp_path / 'sets' / 'log'}\nchecksum ")
    manifest, _ = open_prepared(tmp_path / "sets" / "log")
    assert f"checksum {manifest.checksum}\n" in report
    assert "rows=3000" in report
    assert sorted(path.name for path in (tmp_path / "sets").glob("[!.]*")) == ["log", "log.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["sets"]


@pytest.mark.slow
def test_the_report_says_how_related_the_tasks_of_a_synthetic_log_are(describe, tmp_path):
    settings = ["data.rows=20000", "data.hidden_units=8", "data.relatedness=0.8"]
    describe("data=synthetic", *settings, "data.task_correlation=1", f"data.dir={tmp_path / 'log'}")

    report = (tmp_path / "log.txt").read_text()
    ((train, test),) = cells(report, "click", "conversion")
    assert float(train) == pytest.approx(0.8, abs=0.05)
    assert float(test) == pytest.approx(0.8, abs=0.05)
    assert "Truth: correlation over rows of the labels' true logits" in report


def test_aliexpress_is_described_without_its_raw_files(
    describe, prepare, write_aliexpress, tmp_path
):
    raw_dir = write_aliexpress(tmp_path / "raw")
    prepare("data=aliexpress_nl", f"data.raw_dir={raw_dir}")

    describe("data=aliexpress_nl", f"out={tmp_path / 'reports' / 'nl.txt'}")

    report = (tmp_path / "reports" / "nl.txt").read_text()
    for split in ("train", "test"):
        rates = ["60", "20", "33.333%"], ["20", "10", "50.000%"], ["60", "10", "16.667%"]
        names = (
            ("CTR", "click", "on", "all", "rows"),
            ("CVR", "conversion", "where", "click", "=", "1"),
            ("CTCVR", "conversion", "on", "all", "rows"),
        )
        for name, rate in zip(names, rates, strict=True):
            assert cells(report, split, *name) == [rate]
        assert f"{split} conversions without click: 0\n" in report


@pytest.mark.parametrize("name", ["aliexpress_us", "ali_ccp"])
def test_a_missing_set_ends_in_the_message_that_training_gives(name, describe):
    with pytest.raises(SystemExit, match=f"there is no prepared data set in(.|\n)*data={name}"):
        describe(f"data={name}")


def test_a_report_inside_the_prepared_set_is_refused(describe, tmp_path):
    data = ["data=synthetic", "data.rows=1000", f"data.dir={tmp_path / 'log'}"]

    for inside in (tmp_path / "log" / "report.txt", "log/test/report.txt"):
        message = f"^mtnrec: out must lie outside .*, got {inside}. Choose a file elsewhere"
        with pytest.raises(SystemExit, match=message):
            describe(*data, f"out={inside}")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_a_folder_is_refused(describe, tmp_path):
    with pytest.raises(SystemExit, match=f"^mtnrec: out must be a file, got the folder {tmp_path}"):
        describe("data=synthetic", f"out={tmp_path}")


def test_missing_values_are_separate_from_rare_and_unseen_ones(tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny", train=50, test=10)
    _, arrays = open_prepared(tmp_path / "tiny")
    zeros = {split: int((arrays[split]["categorical"][:, 0] == 0).sum()) for split in arrays}
    assert zeros["train"] > 3

    report = describe_tiny(tmp_path / "tiny")(
        missing={"train": {"categorical_0": 3, "price": 5}, "test": {}}
    )

    (found,) = cells(report, "categorical_0")
    others = (f"{(zeros['train'] - 3) / 50:.2%}", f"{zeros['test'] / 10:.2%}")
    assert found == ["3", "6.00%", others[0], "0", others[1] if zeros["test"] else "0"]
    (price,) = cells(report, "price")  # it numbers the rows
    assert price == ["10.00%", "0", "24.5", "49", "0", "0", "4.5", "9"]


def test_a_multivalued_field_has_a_line(tmp_path, write_tiny):
    manifest = write_tiny(tmp_path / "tiny", train=50, test=10, multivalued=True)
    _, arrays = open_prepared(tmp_path / "tiny")

    report = describe_tiny(tmp_path / "tiny")()

    for column, field in enumerate(manifest.schema.multivalued):
        expected = [str(field.vocabulary_size)]
        for split, rows in (("train", 50), ("test", 10)):
            stems = (f"bags/{field.name}/{part}" for part in ("offsets", "tokens"))
            offsets, tokens = (arrays[split][stem] for stem in stems)
            bags = [
                tokens[slice(*offsets[bag : bag + 2])] for bag in arrays[split]["bag"][:, column]
            ]
            every = np.concatenate(bags)
            empty = sum(not len(bag) for bag in bags)
            shares = [empty / rows, (every == 0).mean()]
            first, second = (f"{share:.2%}" if share else "0" for share in shares)
            expected += [first, f"{len(every) / rows:.2f}", second]
        assert cells(report, field.name)[0] == expected


def test_the_transforms_of_the_features_are_listed(tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny")

    report = describe_tiny(tmp_path / "tiny")(
        transforms={"age": {"fill": 30.5, "shift": 31, "scale": 12.25}}
    )

    assert "(value - shift) / scale is stored" in report
    assert cells(report, "age")[-1] == ["30.5", "31", "12.25"]


def test_a_rate_that_falls_along_the_file_is_shown(tmp_path):
    schema = Schema((), ("price",), ("like",), funnel=False)
    like = np.concatenate([np.arange(100) < 100 - 10 * tenth for tenth in range(10)])
    with write_prepared(tmp_path / "tiny", ("train", "test")) as writer:
        for split in ("train", "test"):
            arrays = {"categorical": np.zeros((1000, 0)), "numerical": np.zeros((1000, 1))}
            writer.append(split, arrays | {"labels": like[:, None]})
        writer.finish(source="tiny", parameters={}, schema=schema, report={})

    report = describe_tiny(tmp_path / "tiny")()

    falling = ["100", "90", "80", "70", "60", "50", "40", "30", "20", "10"]
    assert cells(report, "train", "like")[1] == cells(report, "test", "like")[1] == falling


@pytest.mark.parametrize("leaks", [False, True])
def test_the_report_ends_with_the_suspects(leaks, tmp_path):
    rng = np.random.default_rng(0)
    schema = Schema((CategoricalField("shop", 3),), ("[b]spend",), ("like",), funnel=False)
    with write_prepared(tmp_path / "tiny", ("train", "test")) as writer:
        for split in ("train", "test"):
            like = rng.integers(0, 2, (200, 1))
            arrays = {
                "categorical": rng.integers(0, 3, (200, 1)),
                "numerical": like if leaks else rng.random((200, 1)),
                "labels": like,
            }
            writer.append(split, arrays)
        writer.finish(source="tiny", parameters={}, schema=schema, report={})

    last = describe_tiny(tmp_path / "tiny")().splitlines()[-1]

    if leaks:
        question = "is it known before the label?"
        suspect = "[b]spend alone predicts like on all rows with AUC 1.0000"
        assert last == f"Suspected leak: {suspect}: {question}"
    else:
        assert last == "No judged feature alone has an AUC above 0.99."


def test_a_task_that_cannot_be_judged_is_reported(tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny")

    report = describe_tiny(tmp_path / "tiny")()

    for definition in ("click on all rows", "conversion where click = 1", "conversion on all rows"):
        assert f"{definition:26} not judged: a class has under 20 rows" in report


def test_the_effect_of_noise_is_described(describe, tmp_path, write_tiny, capsys):
    """At proportion 1 and probability 1 whatever has another value changes."""
    write_tiny(tmp_path / "tiny", train=200, test=20, multivalued=True)
    data = ["data=table", f"data.dir={tmp_path / 'tiny'}", f"out={tmp_path / 'out.txt'}"]

    describe(*data, "noise.proportion=1", "noise.feature_probability=1", "noise.splits=[val,test]")

    report = (tmp_path / "out.txt").read_text()
    assert cells(report, "rows", "100.00%") == [["100.00%"]]
    assert cells(report, "categorical_1")[-1] == ["100.00%", "100.00%"]
    assert "40 rows of val, 20 rows of test" in report
    _, arrays = open_prepared(tmp_path / "tiny")
    offsets, bag = arrays["test"]["bags/shops/offsets"], arrays["test"]["bag"][:, 1]
    filled = np.diff(offsets)[bag] > 0
    assert cells(report, "shops")[-1][1] == f"{filled.mean():.2%}"


def test_half_a_proportion_changes_half_of_the_rows(describe, tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny", train=4000, test=20)
    data = ["data=table", f"data.dir={tmp_path / 'tiny'}", f"out={tmp_path / 'out.txt'}"]

    describe(*data, "noise.proportion=0.5", "noise.splits=[train]", "noise.feature_probability=0.3")

    report = (tmp_path / "out.txt").read_text()
    price = float(cells(report, "price")[-1][0].removesuffix("%")) / 100
    assert abs(price - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 3200)


def test_flipped_labels_are_described(describe, tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny", train=200, test=20)
    data = ["data=table", f"data.dir={tmp_path / 'tiny'}", f"out={tmp_path / 'out.txt'}"]

    describe(*data, "noise.label_flip={conversion:1}", "noise.splits=[test]")

    report = (tmp_path / "out.txt").read_text()
    _, arrays = open_prepared(tmp_path / "tiny")
    converted = arrays["test"]["labels"][:, 1].mean()
    assert converted > 0
    assert f"label conversion {converted:.2%}" in report
    assert "label click" not in report


def test_a_transform_without_a_fill_is_described(tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny")

    report = describe_tiny(tmp_path / "tiny")(transforms={"price": {"shift": 2.0, "scale": 0.5}})

    assert cells(report, "price")[-1] == ["-", "2", "0.5"]
