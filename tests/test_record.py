import io
import json
import math
import os

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from mtnrec.record import (
    cell_of,
    closing_table,
    peak_memory_bytes,
    split_counts,
    versions,
    write_record,
)
from mtnrec.schema import Schema


@pytest.fixture
def make_record(funnel_schema):
    """Metrics and counts of every task, of the size of Ali-CCP."""

    def make(schema=funnel_schema, *, bayes=True):
        metrics, counts = {}, {}
        for number, task in enumerate(schema.tasks, start=1):
            values = {"auc": 0.1, "log_loss": 0.2} | ({"bayes_auc": 0.3} if bayes else {})
            for split, offset in (("val", 0.4), ("test", 0.5)):
                metrics |= {
                    f"{split}/{task.name}_{metric}": offset + value + number / 1000
                    for metric, value in values.items()
                }
                counts[f"{split}/{task.name}"] = {
                    "rows": 43_016_840,
                    "positives": 1_630_000 + number,
                }
        config = {"monitor": f"val/{schema.tasks[1].name}_auc"}
        return {"config": config, "best_epoch": 4, "metrics": metrics, "counts": counts}

    return make


def render(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def words(text):
    return " ".join(text.split())


def test_nothing_but_the_record_is_left_in_the_folder(tmp_path):
    write_record(tmp_path, {"seed": 0, "metrics": {"test/ctr_auc": 0.1 + 0.2}})

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == {"seed": 0, "metrics": {"test/ctr_auc": 0.1 + 0.2}}


def test_what_is_undefined_becomes_null(tmp_path):
    write_record(tmp_path, {"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf, "e": None}})

    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == {"a": None, "b": [None, 1.0], "c": {"d": None, "e": None}}


def test_an_old_record_survives_a_failing_write(tmp_path, monkeypatch):
    def full_disk(_):
        raise OSError("no space left on device")

    write_record(tmp_path, {"seed": 0})
    monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(OSError, match="no space left"):
        write_record(tmp_path, {"seed": 1})

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"seed": 0}


def test_an_old_record_survives_values_that_json_cannot_hold(tmp_path):
    write_record(tmp_path, {"seed": 0})

    with pytest.raises(TypeError, match="not JSON serializable"):
        write_record(tmp_path, {"seed": object()})

    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"seed": 0}


@pytest.fixture
def cell(compose_config):
    config = compose_config("output_dir=run")

    def make(key=None, value=None, *, checksum="abc"):
        changed = config.copy()
        if key is not None:
            OmegaConf.update(changed, key, value)
        return cell_of(OmegaConf.to_container(changed, resolve=True), checksum)

    return make


def test_a_cell_does_not_depend_on_where_a_run_reads_and_writes(cell):
    assert cell("logger.name", "other") == cell()
    assert cell("output_dir", "elsewhere") == cell()
    assert cell("data_root", "elsewhere") == cell()
    assert cell("data.dir", "elsewhere") == cell()
    assert cell("data.verify", value=False) == cell()


def test_every_setting_and_content_of_the_data_set_makes_a_cell_of_its_own(cell):
    cells = [
        cell(),
        cell("seed", 1),
        cell("mtn.lam", 1e-4),
        cell("mtn.enabled", value=True),
        cell("model.embedding_dim", 64),
        cell("data.split_seed", 1),
        cell("patience", 4),
        cell(checksum="abd"),
    ]

    assert len(set(cells)) == len(cells)


def test_a_cell_does_not_depend_on_the_order_of_the_keys():
    data = {"name": "tiny", "batch_size": 2}
    backwards = {"batch_size": 2, "name": "tiny"}

    assert cell_of({"seed": 0, "data": data}, "") == cell_of({"data": backwards, "seed": 0}, "")


def test_counts_are_told_apart_from_metrics():
    results = {
        "val/ctr_auc": 0.5,
        "val/ctr_log_loss": 0.1,
        "val/ctr_rows": 7,
        "val/ctr_positives": 2,
    }

    metrics, counts = split_counts(results)

    assert metrics == {"val/ctr_auc": 0.5, "val/ctr_log_loss": 0.1}
    assert counts == {"val/ctr": {"rows": 7, "positives": 2}}


def test_versions_and_memory_are_known():
    found = versions()

    assert found["torch"].startswith("2.")
    assert found.keys() >= {"python", "mtnrec", "lightning", "torchmetrics"}
    assert 2**20 < peak_memory_bytes() < 2**40


def test_the_table_says_what_was_measured_on_which_rows(funnel_schema, make_record):
    table = closing_table(funnel_schema, make_record())

    headers = [words(column.header) for column in table.columns]
    task, definition, rows, positives, *results = (list(c.cells) for c in table.columns)
    assert headers[:4] == ["task", "definition", "rows", "positives"]
    assert headers[4:] == ["val AUC", "test AUC", "log loss", "Bayes AUC"]
    assert task == ["CTR", "CVR", "CTCVR"]
    assert definition == [
        "click on all rows",
        "conversion where click = 1",
        "conversion on all rows",
    ]
    assert rows == ["43,016,840"] * 3
    assert positives == ["1,630,001", "1,630,002", "1,630,003"]
    assert results == [
        ["0.5010", "0.5020", "0.5030"],
        ["0.6010", "0.6020", "0.6030"],
        ["0.7010", "0.7020", "0.7030"],
        ["0.8010", "0.8020", "0.8030"],
    ]
    assert table.title == "Best epoch 4, chosen by val/cvr_auc"
    assert table.caption.startswith("rows, positives and log loss: test set")


@pytest.mark.parametrize("bayes", [True, False])
def test_the_table_of_a_funnel_fits_80_columns_uncut(bayes, funnel_schema, make_record):
    table = closing_table(funnel_schema, make_record(bayes=bayes))

    text = render(table)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert ("Bayes" in text) == bayes
    cells = [cell for column in table.columns for cell in column.cells]
    assert set(" ".join(cells).split()) <= set(text.split())


def test_independent_labels_go_by_their_own_names(make_record):
    schema = Schema((), ("price",), ("is_liked", "is_shared"), funnel=False)

    text = render(closing_table(schema, make_record(schema)))

    assert "…" not in text
    assert "is_liked" in text
    assert "is_shared" in text


def test_an_undefined_monitor_is_said_to_have_chosen_nothing(funnel_schema, make_record):
    record = make_record()
    record["metrics"]["val/cvr_auc"] = math.nan

    table = closing_table(funnel_schema, record)

    assert table.title == "Last epoch 4: val/cvr_auc is undefined"


def test_an_undefined_value_is_shown_as_such(funnel_schema, make_record):
    record = make_record()
    record["metrics"]["test/cvr_auc"] = math.nan

    text = render(closing_table(funnel_schema, record))

    assert "nan" in text
