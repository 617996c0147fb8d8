import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from mtnrec.run.environment import versions
from mtnrec.schema import Schema
from mtnrec.training.recorder import peak_memory_bytes, split_counts
from mtnrec.training.summary import summary_table, warn_of_weak_scores


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
        return SimpleNamespace(
            config=config, best_epoch=4, metrics=metrics, counts=counts, is_tested=True
        )

    return make


def render(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def words(text):
    return " ".join(text.split())


def test_counts_are_separated_from_metrics():
    results = {
        "val/ctr_auc": 0.5,
        "val/ctr_log_loss": 0.1,
        "val/ctr_rows": 7,
        "val/ctr_positives": 2,
    }

    metrics, counts = split_counts(results)

    assert metrics == {"val/ctr_auc": 0.5, "val/ctr_log_loss": 0.1}
    assert counts == {"val/ctr": {"rows": 7, "positives": 2}}


def test_versions_and_memory_are_available():
    found = versions()

    assert found["torch"].startswith("2.")
    assert found.keys() >= {"python", "mtnrec", "lightning", "torchmetrics"}
    assert 2**20 < peak_memory_bytes() < 2**40


def test_the_table_shows_which_rows_a_metric_is_measured_on(funnel_schema, make_record):
    table = summary_table(funnel_schema, make_record())

    headers = [words(column.header) for column in table.columns]
    task, definition, rows, positives, *results = (list(c.cells) for c in table.columns)
    assert headers[:4] == ["task", "definition", "rows", "positives"]
    assert headers[4:] == ["val AUC", "test AUC", "log loss", "Bayes AUC"]
    assert task == ["CTR", "CVR", "CTCVR"]
    assert [words(text) for text in definition] == [
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
    table = summary_table(funnel_schema, make_record(bayes=bayes))

    text = render(table)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert ("Bayes" in text) == bayes
    cells = [cell for column in table.columns for cell in column.cells]
    assert set(" ".join(cells).split()) <= set(text.split())


def test_independent_labels_keep_their_names(make_record):
    schema = Schema((), ("price",), ("is_liked", "is_shared"), funnel=False)

    text = render(summary_table(schema, make_record(schema)))

    assert "…" not in text
    assert "is_liked" in text
    assert "is_shared" in text


def test_an_undefined_monitor_is_reported_to_have_chosen_nothing(funnel_schema, make_record):
    record = make_record()
    record.metrics["val/cvr_auc"] = math.nan

    table = summary_table(funnel_schema, record)

    assert table.title == "Last epoch 4: val/cvr_auc is undefined"


def test_an_undefined_value_is_shown_as_such(funnel_schema, make_record):
    record = make_record()
    record.metrics["test/cvr_auc"] = math.nan

    text = render(summary_table(funnel_schema, record))

    assert "nan" in text


def test_scores_worse_than_chance_or_a_constant_are_warned_of_once(
    funnel_schema, make_record, caplog
):
    record = make_record()
    record.metrics |= {"test/ctr_auc": 0.4607, "test/cvr_log_loss": 9.0}
    record.metrics |= {f"test/{task}_log_loss": 0.01 for task in ("ctr", "ctcvr")}

    warn_of_weak_scores(funnel_schema, record)

    (message,) = caplog.messages
    assert "the test AUC is below the 0.5 of chance (ctr 0.4607), and" in message
    assert "(cvr 9.0000 > 0.16" in message
    assert message.endswith("whether the numerical features are scaled")


def test_good_and_undefined_scores_are_not_warned_of(funnel_schema, make_record, caplog):
    record = make_record()
    record.metrics |= {f"test/{task}_log_loss": 0.01 for task in ("ctr", "cvr", "ctcvr")}
    record.metrics["test/cvr_auc"] = math.nan

    warn_of_weak_scores(funnel_schema, record)

    assert caplog.messages == []
