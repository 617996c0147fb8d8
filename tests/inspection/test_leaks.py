"""Suspected leaks: what is planted is found, what is honest or learnt by heart is not."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mtnrec.inspection import leaks as leak
from mtnrec.inspection.leaks import check_leaks
from mtnrec.schema import CategoricalField, Schema

ROWS = 4000


def draw_labels(rng, rows=ROWS):
    click = rng.random(rows) < 0.3
    return np.stack([click, click & (rng.random(rows) < 0.4)], axis=1).astype(np.uint8)


def numerical(values):
    schema = Schema((), ("feature",), ("click", "conversion"), funnel=True)
    return schema, {
        "categorical": np.zeros((len(values), 0), np.int32),
        "numerical": np.asarray(values, np.float32)[:, None],
    }


def categorical(indices):
    fields = (CategoricalField("feature", int(indices.max()) + 1),)
    return Schema(fields, (), ("click", "conversion"), funnel=True), {
        "categorical": np.asarray(indices, np.int32)[:, None],
        "numerical": np.zeros((len(indices), 0), np.float32),
    }


def multivalued(bags):
    """One bag a row, stored in reverse so that a row and its bag differ in number."""
    field = CategoricalField("feature", 1 + int(max(token for bag in bags for token in bag)))
    tokens = [token for bag in reversed(bags) for token in bag]
    rows = len(bags)
    return Schema((), (), ("click", "conversion"), funnel=True, multivalued=(field,)), {
        "categorical": np.zeros((rows, 0), np.int32),
        "numerical": np.zeros((rows, 0), np.float32),
        "bag": np.arange(rows, dtype=np.int32)[::-1, None],
        "bags/feature/offsets": np.cumsum([0, *(len(bag) for bag in reversed(bags))]),
        "bags/feature/tokens": np.array(tokens, np.int32),
        "bags/feature/weights": np.ones(len(tokens), np.float32),
    }


def check(feature, labels, *, rows=None, group=None):
    schema, arrays = feature
    arrays = arrays | {"labels": labels} | ({} if group is None else {"group": group})
    return check_leaks(arrays, np.arange(len(labels)) if rows is None else rows, schema)


def honest_bags(rng, rows=ROWS):
    return [rng.integers(1, 20, size).tolist() for size in rng.integers(0, 6, rows)]


LEAKS = {
    "numerical": lambda label, rng: numerical(label + 0.1 * rng.random(ROWS)),
    "inverted": lambda label, rng: numerical(0.1 * rng.random(ROWS) - label),
    "on both sides": lambda label, rng: numerical(
        (rng.random(ROWS) - 0.5) + label * rng.choice([-9, 9], ROWS)
    ),
    "filled where negative": lambda label, rng: numerical(
        np.where(label, rng.normal(size=ROWS), 0)
    ),
    "categorical": lambda label, rng: categorical(2 * label + rng.integers(1, 3, ROWS)),
    "absent where negative": lambda label, rng: categorical(label * np.arange(1, ROWS + 1)),
    "a token": lambda label, rng: multivalued(
        [[*bag[:2], *([20] * x)] for bag, x in zip(honest_bags(rng), label, strict=True)]
    ),
    "empty where negative": lambda label, rng: multivalued([[3, 4] * x for x in label.astype(int)]),
}
HONEST = {
    "numerical": lambda label, rng: numerical(label + rng.normal(size=ROWS)),
    "constant": lambda label, rng: numerical(np.ones(ROWS)),
    "categorical": lambda label, rng: categorical(rng.integers(0, 9, ROWS)),
    "an id of each row": lambda label, rng: categorical(1 + rng.permutation(ROWS)),
    "multi-valued": lambda label, rng: multivalued(honest_bags(rng)),
    "a token of each row": lambda label, rng: multivalued([[row] for row in range(ROWS)]),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_feature_that_reveals_the_conversion_is_suspected(kind):
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)

    found = check(LEAKS[kind](labels[:, 1].astype(int), rng), labels)

    suspected = [(leak.feature, leak.task, leak.definition) for leak in found.leaks]
    assert suspected == [
        ("feature", "cvr", "conversion where click = 1"),
        ("feature", "ctcvr", "conversion on all rows"),
    ]
    assert all(leak.auc > 0.99 for leak in found.leaks)


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_feature_is_not_suspected(kind):
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)

    found = check(HONEST[kind](labels[:, 1].astype(int), rng), labels)

    assert found.leaks == []
    assert found.not_judged == []
    assert all(0.4 < found.aucs[task]["feature"] < 0.9 for task in ("ctr", "cvr", "ctcvr"))


def test_a_suspicion_asks_when_the_feature_is_known():
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)

    found = check(numerical(labels[:, 0]), labels)

    assert [str(leak) for leak in found.leaks] == [
        "feature alone predicts click on all rows with AUC 1.0000: is it known before the label?"
    ]


def test_the_rates_of_indices_are_learnt_on_every_other_row_and_measured_on_the_rest():
    rng = np.random.default_rng(0)
    labels = draw_labels(rng, 600)
    indices = rng.integers(0, 150, 600)

    found = check(categorical(indices), labels)

    frame = pd.DataFrame({"index": indices, "click": labels[:, 0], "conversion": labels[:, 1]})
    clicked = frame[frame.click == 1]
    for task, part, label in (
        ("ctr", frame, "click"),
        ("cvr", clicked, "conversion"),
        ("ctcvr", frame, "conversion"),
    ):
        learnt, scored = (part[part.index % 2 == half] for half in (0, 1))
        rates = learnt.groupby("index")[label].mean()
        scores = scored["index"].map(rates).fillna(learnt[label].mean())
        expected = roc_auc_score(scored[label], scores)
        assert found.aucs[task]["feature"] == pytest.approx(expected, abs=1e-12)


def test_a_row_has_the_mean_rate_of_its_tokens():
    rng = np.random.default_rng(0)
    labels, bags = draw_labels(rng, 600), honest_bags(rng, 600)

    found = check(multivalued(bags), labels)

    frame = pd.DataFrame({"bag": [bag or ["none"] for bag in bags], "click": labels[:, 0]})
    learnt, scored = frame[::2], frame[1::2]
    rates = learnt.explode("bag").groupby("bag").click.mean()
    scores = [np.mean([rates[token] for token in bag]) for bag in scored.bag]
    expected = roc_auc_score(scored.click, scores)
    assert found.aucs["ctr"]["feature"] == pytest.approx(expected, abs=1e-3)  # ties, rounded


@pytest.mark.parametrize("sign", [1, -1])
def test_a_numerical_feature_has_the_exact_auc_of_its_values_where_that_is_larger(sign):
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)
    values = (labels[:, 0] * 1.5 + rng.normal(size=ROWS)).round(2)

    found = check(numerical(sign * values), labels)

    expected = roc_auc_score(labels[1::2, 0], values[1::2])
    assert found.aucs["ctr"]["feature"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("make", [categorical, lambda indices: multivalued(indices[:, None])])
def test_the_name_of_a_group_is_not_a_leak_though_the_group_decides_the_label(make):
    rng = np.random.default_rng(0)
    user = rng.integers(0, 200, ROWS)
    labels = draw_labels(rng, 200)[user]

    learnt_by_heart = check(make(1 + user), labels)
    by_group = check(make(1 + user), labels, group=user.astype(np.int64))

    assert {leak.task for leak in learnt_by_heart.leaks} == {"ctr", "cvr", "ctcvr"}
    assert by_group.leaks == []
    assert by_group.aucs["ctr"]["feature"] == 0.5


@pytest.mark.parametrize(("positives", "judged"), [(19, False), (20, True)])
def test_a_task_with_few_positives_is_not_judged(positives, judged):
    rng = np.random.default_rng(0)
    labels = np.zeros((ROWS, 2), np.uint8)
    labels[:, 0] = rng.random(ROWS) < 0.5
    conversions = np.flatnonzero(labels[1::2, 0])[:positives]
    labels[1 + 2 * conversions, 1] = 1

    found = check(numerical(labels[:, 1]), labels)

    assert found.not_judged == ([] if judged else ["cvr", "ctcvr"])
    assert [leak.task for leak in found.leaks] == (["cvr", "ctcvr"] if judged else [])
    assert found.aucs["ctr"] is not None


def test_rows_that_do_not_train_are_not_read():
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)
    trains = rng.random(ROWS) < 0.5
    values = np.where(trains, rng.random(ROWS), labels[:, 0])

    found = check(numerical(values), labels, rows=np.flatnonzero(trains))

    assert found.rows == trains.sum()
    assert found.leaks == []


def test_a_large_set_is_sampled_along_the_whole_file(monkeypatch):
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)
    # A leak in the second half of the file only: AUC 3/4 on all of it.
    values = np.where(np.arange(ROWS) < ROWS // 2, rng.integers(0, 2, ROWS), labels[:, 0])
    monkeypatch.setattr(leak, "_SAMPLE", 1024)
    monkeypatch.setattr(leak, "_RUN", 8)

    found = check(categorical(values), labels)

    assert found.rows == 1024
    assert found.aucs["ctr"]["feature"] == pytest.approx(0.75, abs=0.1)


def test_a_value_that_runs_of_rows_share_is_not_memorised(monkeypatch):
    rng = np.random.default_rng(0)
    # Without a group: eight rows of a user, who always clicks or never does.
    labels = draw_labels(rng, ROWS // 8).repeat(8, axis=0)
    monkeypatch.setattr(leak, "_SAMPLE", 1024)
    monkeypatch.setattr(leak, "_RUN", 8)

    found = check(categorical(np.arange(ROWS // 8).repeat(8)), labels)

    assert found.aucs["ctr"]["feature"] < 0.9


def test_a_set_without_a_judged_task_has_no_suspects():
    found = check(numerical(np.zeros(6)), np.zeros((6, 2), np.uint8))

    assert found.aucs == {"ctr": None, "cvr": None, "ctcvr": None}
    assert found.leaks == []
