"""What a split holds, against pandas and plain loops."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit

from mtnrec.data.prepared.store import open_prepared
from mtnrec.inspection import statistics
from mtnrec.inspection.statistics import count_split
from mtnrec.schema import Schema


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(statistics, "_ROWS_PER_PIECE", 7)


@pytest.fixture
def prepared(tmp_path, write_tiny):
    write_tiny(tmp_path / "tiny", train=103, test=9, multivalued=True)
    return open_prepared(tmp_path / "tiny")


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_and_positives_of_each_tenth_equal_those_of_pandas(prepared, split):
    manifest, arrays = prepared

    found = count_split(arrays[split], manifest.schema)

    labels = pd.DataFrame(np.array(arrays[split]["labels"]), columns=["click", "conversion"])
    rows = len(labels)
    tenth = [next(k for k in range(10) if row < rows * (k + 1) // 10) for row in range(rows)]
    by_tenth = labels.groupby(tenth)
    sizes, clicks, conversions = (
        numbers.reindex(range(10), fill_value=0)
        for numbers in (by_tenth.size(), by_tenth.click.sum(), by_tenth.conversion.sum())
    )
    assert found.rows == rows
    np.testing.assert_array_equal(found.task_rows, np.stack([sizes, clicks, sizes], axis=1))
    expected = np.stack([clicks, conversions, conversions], axis=1)
    np.testing.assert_array_equal(found.task_positives, expected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_feature_statistics_equal_those_of_pandas(prepared, split):
    manifest, arrays = prepared

    found = count_split(arrays[split], manifest.schema)

    categorical, numerical = (
        pd.DataFrame(np.array(arrays[split][stem])) for stem in ("categorical", "numerical")
    )
    np.testing.assert_array_equal(found.zeros, (categorical == 0).sum())
    described = numerical.astype(np.float64).describe()
    np.testing.assert_array_equal(found.minimum, described.loc["min"])
    np.testing.assert_array_equal(found.maximum, described.loc["max"])
    np.testing.assert_allclose(found.mean, described.loc["mean"], rtol=1e-14)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_bag_counts_once_for_each_row_that_has_it(prepared, split):
    manifest, arrays = prepared

    found = count_split(arrays[split], manifest.schema)

    for column, field in enumerate(manifest.schema.multivalued):
        offsets, tokens = (arrays[split][f"bags/{field.name}/{p}"] for p in ("offsets", "tokens"))
        bags = [
            tokens[offsets[bag] : offsets[bag + 1]].tolist()
            for bag in arrays[split]["bag"][:, column]
        ]
        assert found.empty_bags[column] == sum(not bag for bag in bags)
        assert found.tokens[column] == sum(map(len, bags))
        assert found.zero_tokens[column] == sum(bag.count(0) for bag in bags)


def test_independent_labels_count_on_all_rows():
    schema = Schema((), (), ("like", "share"), funnel=False)
    labels = np.array([[0, 1], [1, 0], [0, 1], [0, 1]], np.uint8)
    arrays = {stem: np.zeros((4, 0)) for stem in ("categorical", "numerical")}

    found = count_split({**arrays, "labels": labels}, schema)

    assert found.task_rows.sum(axis=0).tolist() == [4, 4]
    assert found.task_positives.sum(axis=0).tolist() == [1, 3]


def test_a_split_without_rows_has_no_values():
    schema = Schema((), ("price",), ("like",), funnel=False)
    arrays = {
        "labels": np.zeros((0, 1), np.uint8),
        "categorical": np.zeros((0, 0), np.int32),
        "numerical": np.zeros((0, 1), np.float32),
    }

    found = count_split(arrays, schema)

    assert found.rows == found.task_rows.sum() == 0
    assert np.isnan([found.minimum, found.mean, found.maximum]).all()


@pytest.mark.parametrize("funnel", [True, False])
def test_true_logits_correlate_as_in_numpy(prepared, funnel):
    manifest, arrays = prepared
    rows, rng = len(arrays["train"]["labels"]), np.random.default_rng(0)
    given = rng.uniform(0.02, 0.98, (rows, 2))
    given[:, 1] = (given.sum(axis=1) / 2).clip(0.02, 0.98)
    probabilities = given.cumprod(axis=1) if funnel else given
    schema = dataclasses.replace(manifest.schema, funnel=funnel)

    found = count_split({**arrays["train"], "probabilities": probabilities}, schema)

    expected = np.corrcoef(logit(given), rowvar=False)
    np.testing.assert_allclose(found.true_correlations, expected, rtol=1e-10)
    assert 0.3 < expected[0, 1] < 0.95
    assert count_split(arrays["train"], schema).true_correlations is None
