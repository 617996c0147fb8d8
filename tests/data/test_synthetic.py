"""The synthetic log against its own probabilities and against the shape that it imitates."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from mtnrec.checks import InputError
from mtnrec.data import synthetic
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.synthetic import Synthetic
from mtnrec.metric.task_metrics import bayes_aucs

SETTINGS = {
    "name": "synthetic",
    "batch_size": 256,
    "validation_share": 0.2,
    "validation_split": "random",
    "split_seed": 0,
    "seed": 0,
    "verify": True,
    "rows": 2001,
    "rows_per_search": 2,
    "test_share": 0.25,
    "vocabulary_sizes": [1, 5, 150, 30, 4],
    "vocabulary_scale": 1.0,
    "user_fields": 3,
    "numerical_features": 6,
    "user_numerical_features": 2,
    "skew": 1.0,
    "rank": 3,
    "click_rate": 0.3,
    "conversion_rate": 0.25,
    "click_spread": 1.2,
    "conversion_spread": 1.5,
    "task_correlation": 0.5,
    "interaction": 0.2,
    "generator_seed": 0,
}


def generate(directory, **changes):
    """The manifest and the rows of both splits together."""
    manifest = Synthetic(**SETTINGS | {"dir": directory} | changes).prepare()
    _, arrays = open_prepared(directory)
    stems = arrays["train"]
    return manifest, {
        stem: np.concatenate([arrays[split][stem] for split in ("train", "test")]) for stem in stems
    }


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def split_probabilities(log):
    """P(click) and P(conversion | click)."""
    click, both = log["probabilities"].T
    return click, both / click


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """20,000 rows; enough for their statistics."""
    directory = tmp_path_factory.mktemp("log") / "synthetic"
    return generate(directory, rows=20_000)[1]


def test_positives_match_the_rates(log):
    click, conversion = log["labels"].astype(bool).T

    for positives, rate in ((click, 0.3), (conversion[click], 0.25)):
        # The rows of a search go together, at worst as one row; the rates were fitted on 16,384.
        variance = rate * (1 - rate)
        deviation = np.sqrt(2 * variance / len(positives) + 2 * variance / 16_384)
        assert positives.mean() == pytest.approx(rate, abs=4 * deviation)


def test_labels_follow_the_funnel(log):
    click, conversion = log["labels"].T

    assert set(np.unique(log["labels"])) == {0, 1}
    assert (conversion <= click).all()


def test_probabilities_are_calibrated_at_every_level(log):
    click, conversion = log["labels"].T
    clicked = click == 1
    given_click = split_probabilities(log)[1]
    tasks = [
        (log["probabilities"][:, 0], click),
        (log["probabilities"][:, 1], conversion),
        (given_click[clicked], conversion[clicked]),
    ]

    for p, labels in tasks:
        order = np.argsort(p)
        for rows in [order, *np.array_split(order, 10)]:
            excess = (labels[rows] - p[rows]).sum()
            assert abs(excess) < 4.5 * np.sqrt((p[rows] * (1 - p[rows])).sum())


def test_bayes_auc_beats_chance_and_every_column(log):
    click, conversion = log["labels"].T
    clicked = click == 1
    p_click, p_conversion = split_probabilities(log)
    tasks = [
        (slice(None), click, p_click),
        (slice(None), conversion, log["probabilities"][:, 1]),
        (clicked, conversion[clicked], p_conversion),
    ]

    for rows, labels, p in tasks:
        bayes = roc_auc_score(labels, p[rows])
        columns = [*log["numerical"].T]
        for values in log["categorical"].T:
            sums = np.bincount(values, p)
            columns.append((sums / np.bincount(values).clip(min=1))[values])
        aucs = [roc_auc_score(labels, column[rows]) for column in columns]
        assert bayes > 0.65
        assert bayes > max(*aucs, *(1 - auc for auc in aucs)) + 0.02


def test_logits_have_the_spreads(log):
    for p, spread in zip(split_probabilities(log), (1.2, 1.5), strict=True):
        assert logit(p).std() == pytest.approx(spread, rel=0.05)


def test_without_spread_the_probabilities_are_the_rates(tmp_path):
    _, log = generate(tmp_path / "log", click_spread=0.0, conversion_spread=0.0)

    click, conversion = split_probabilities(log)
    np.testing.assert_allclose(click, 0.3, rtol=1e-12)
    np.testing.assert_allclose(conversion, 0.25, rtol=1e-12)


def test_tasks_of_correlation_one_rank_the_same(tmp_path):
    _, log = generate(tmp_path / "log", task_correlation=1.0, interaction=0.0)

    click, conversion = map(logit, split_probabilities(log))
    assert np.corrcoef(click, conversion)[0, 1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_logits_have_the_given_correlation(tmp_path, correlation):
    # Many large fields make the planted dimensions independent, so that only the tasks correlate.
    settings = {"vocabulary_sizes": [500] * 60, "user_fields": 0, "skew": 0.0, "interaction": 0.0}
    settings |= {"numerical_features": 0, "user_numerical_features": 0, "rows": 4000}

    _, log = generate(tmp_path / "log", task_correlation=correlation, **settings)

    click, conversion = map(logit, split_probabilities(log))
    assert np.corrcoef(click, conversion)[0, 1] == pytest.approx(correlation, abs=0.06)


def test_without_interaction_the_logit_is_a_sum_over_columns(tmp_path):
    _, log = generate(tmp_path / "log", interaction=0.0, vocabulary_sizes=[1, 5, 9, 7, 4])

    ones = [np.eye(column.max() + 1)[column] for column in log["categorical"].T]
    design = np.concatenate([*ones, log["numerical"]], axis=1)
    target = logit(split_probabilities(log)[0])
    fitted = design @ np.linalg.lstsq(design, target)[0]
    np.testing.assert_allclose(fitted, target, atol=1e-5)


def test_the_rows_of_the_default_settings_are_those_of_before_hidden_layers(tmp_path):
    generate(tmp_path / "log")

    _, arrays = open_prepared(tmp_path / "log")
    digest = hashlib.sha256()
    for split, stem in itertools.product(("train", "test"), ("categorical", "numerical", "labels")):
        digest.update(np.ascontiguousarray(arrays[split][stem]).tobytes())
    assert digest.hexdigest()[:16] == "14aad3466a8c77cf"


HIDDEN = {"hidden_units": 16, "task_correlation": 1.0}


@pytest.mark.parametrize(
    ("relatedness", "correlation"), [(0.0, 1.0), (0.3, 1.0), (0.7, 0.6), (1.0, 0.0), (1.0, 0.8)]
)
def test_true_logits_correlate_as_asked(tmp_path, relatedness, correlation):
    settings = {"relatedness": relatedness, "task_correlation": correlation, "rows": 20_000}

    _, log = generate(tmp_path / "log", **HIDDEN | settings)

    click, conversion = map(logit, split_probabilities(log))
    # It was set on 16,384 other rows; blocks of searches tell how far a sample is off.
    blocks = [np.corrcoef(*rows)[0, 1] for rows in np.split(np.stack([click, conversion]), 20, 1)]
    deviation = np.std(blocks) * np.sqrt((1 + 20_000 / 16_384) / 20)
    assert (
        abs(np.corrcoef(click, conversion)[0, 1] - relatedness * correlation) < 4 * deviation + 1e-9
    )
    assert deviation < 0.03
    assert click.std() == pytest.approx(1.2, rel=0.05)
    assert conversion.std() == pytest.approx(1.5, rel=0.05)


def test_fully_related_tasks_are_one_function_up_to_scale(tmp_path):
    _, log = generate(tmp_path / "log", **HIDDEN)

    click, conversion = map(logit, split_probabilities(log))
    (slope, _), rest, *_ = np.polyfit(click, conversion, 1, full=True)
    assert slope == pytest.approx(1.5 / 1.2)
    assert rest == pytest.approx(0, abs=1e-12)


def kinks(**changes):
    """Where the true logits of click and of conversion bend along a line of the features."""
    line = {"vocabulary_sizes": [1], "user_fields": 1, "interaction": 0.0, "rank": 2}
    line |= {"numerical_features": 2, "user_numerical_features": 0, "dir": Path("log")}
    steps = np.linspace(-8, 8, 40_001)
    numerical = np.column_stack([steps, 0.3 - 0.4 * steps])
    settings = SETTINGS | line | {"hidden_units": 6} | changes
    logits = Synthetic(**settings).logits(np.zeros((len(steps), 1), int), numerical)
    bends = np.abs(np.diff(logits, n=2)) > 1e-8
    # A kink between two steps shows at one or both of its neighbours.
    return [{round(steps[i + 1], 2) for i in np.flatnonzero(b)} for b in bends]


def test_relatedness_shares_hidden_units_and_correlation_shares_their_heads():
    click, conversion = kinks(relatedness=1.0, task_correlation=0.0)
    assert len(click) > 3
    assert conversion == click  # the same units, in functions without correlation

    same_click, apart = kinks(relatedness=0.0, task_correlation=1.0)
    assert same_click == click
    assert len(apart) > 3
    assert not apart & click

    _, both = kinks(relatedness=0.5, task_correlation=1.0)
    assert both == apart | click


def test_the_clicks_do_not_depend_on_how_conversions_relate_to_them(tmp_path):
    changes = [{}, {"relatedness": 0.2}, {"task_correlation": 0.1}, {"conversion_rate": 0.05}]
    logs = [
        generate(tmp_path / str(number), **HIDDEN | own)[1] for number, own in enumerate(changes)
    ]

    for log in logs[1:]:
        for stem in ("categorical", "numerical"):
            np.testing.assert_array_equal(log[stem], logs[0][stem])
        np.testing.assert_array_equal(log["labels"][:, 0], logs[0]["labels"][:, 0])
        assert (log["probabilities"][:, 1] != logs[0]["probabilities"][:, 1]).all()
    # Rarer conversions are some of the others.
    rare, often = logs[3]["labels"][:, 1], logs[0]["labels"][:, 1]
    assert (rare <= often).all()
    assert 0 < rare.sum() < often.sum() / 3


def test_later_stages_leave_the_earlier_ones_unchanged(tmp_path):
    _, two = generate(tmp_path / "two", **HIDDEN, relatedness=0.5)
    _, three = generate(tmp_path / "three", **HIDDEN, relatedness=0.5, later_stages={"buy": 0.5})

    np.testing.assert_allclose(three["probabilities"][:, :2], two["probabilities"], rtol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"relatedness": 0.6, "task_correlation": 0.8},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"relatedness": 0.0, "task_correlation": 1.0},
                {"relatedness": 1.0, "conversion_rate": 0.08},
                {"hidden_units": 64, "interaction": 0.9, "conversion_spread": 3.0},
            )
        ),
    ],
)
def test_bayes_aucs_are_those_of_labels_simulated_from_the_truth(tmp_path, changes):
    settings = HIDDEN | {"rows": 8000} | changes
    datamodule = Synthetic(**SETTINGS | settings | {"dir": tmp_path / "log", "test_share": 0.5})
    datamodule.prepare_data()
    datamodule.setup()
    probabilities = datamodule.column("test", "probabilities")
    found = bayes_aucs(datamodule.schema, probabilities, datamodule.column("test", "labels"))

    # Labels of the rows' own features and the stored logits, drawn afresh.
    click = probabilities[:, 0]
    given = probabilities[:, 1] / click
    simulated = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clicks = rng.random(len(click)) < click
        both = clicks & (rng.random(len(click)) < given)
        simulated.append(
            (
                roc_auc_score(clicks, click),
                roc_auc_score(both[clicks], given[clicks]),
                roc_auc_score(both, click * given),
            )
        )
    mean, deviation = np.mean(simulated, axis=0), np.std(simulated, axis=0)
    names = ("ctr_bayes_auc", "cvr_bayes_auc", "ctcvr_bayes_auc")
    for name, middle, sd in zip(names, mean, deviation, strict=True):
        assert abs(found[name] - middle) < 4 * sd < 0.12
        assert found[name] > 0.6
    # The AUC of the truth integrated over all pairs of rows: P(higher score | one label each).
    order = np.argsort(click)
    positive, negative = click[order], 1 - click[order]
    integral = (positive * (negative.cumsum() - negative / 2)).sum()
    integral /= positive.sum() * negative.sum()
    assert mean[0] == pytest.approx(integral, abs=4 * deviation[0] / np.sqrt(60) + 1e-4)


def test_conversions_follow_the_stored_truth_of_hidden_layers(tmp_path):
    _, log = generate(tmp_path / "log", rows=20_000, **HIDDEN, relatedness=0.4)

    given = split_probabilities(log)[1]
    clicked = log["labels"][:, 0] == 1
    order = np.argsort(given[clicked])
    for rows in np.array_split(order, 10):
        p, labels = given[clicked][rows], log["labels"][clicked, 1][rows]
        assert abs((labels - p).sum()) < 4.5 * np.sqrt((p * (1 - p)).sum())


def test_a_log_with_hidden_layers_is_not_taken_for_one_without(tmp_path):
    generate(tmp_path / "log", **HIDDEN, relatedness=0.5, later_stages={"buy": 0.5})
    plain = Synthetic(**SETTINGS | {"dir": tmp_path / "log", "task_correlation": 1.0})

    message = (
        r"\(later_stages: .* there, None here; hidden_units: 16 there, 0 here; "
        r"relatedness: 0\.5 there, 1\.0 here\)"
    )
    with pytest.raises(InputError, match=message):
        plain.prepare_data()


def test_features_without_enough_values_for_hidden_layers_are_refused(tmp_path):
    settings = {"vocabulary_sizes": [2], "user_fields": 1, "dir": tmp_path / "log"}
    settings |= {"numerical_features": 0, "user_numerical_features": 0}

    message = (
        "data.hidden_units must be 0 where the features have too few values for heads that do not "
        "correlate, got 16. Add fields or features, or set data.hidden_units=0."
    )
    with pytest.raises(InputError, match=message):
        Synthetic(**SETTINGS | HIDDEN | settings).prepare()


def test_interaction_cannot_be_expressed_as_a_sum(tmp_path):
    _, log = generate(tmp_path / "log", interaction=1.0, vocabulary_sizes=[1, 5, 9, 7, 4])

    ones = [np.eye(column.max() + 1)[column] for column in log["categorical"].T]
    design = np.concatenate([*ones, log["numerical"]], axis=1)
    target = logit(split_probabilities(log)[0])
    fitted = design @ np.linalg.lstsq(design, target)[0]
    assert (target - fitted).var() > 0.8 * target.var()


def test_values_have_the_given_skew(tmp_path):
    rows = 20_000
    generate(tmp_path / "log", rows=rows, skew=1.5)

    _, arrays = open_prepared(tmp_path / "log")
    indices = arrays["train"]["categorical"][:, 3]  # an item field: each row draws for itself
    table = pl.read_parquet(tmp_path / "log" / "vocabulary" / "categorical_4.parquet")
    counts = dict(zip(table["value"], np.bincount(indices)[table["index"]], strict=True))
    weights = np.arange(1, 31) ** -1.5
    for value, share in enumerate(weights / weights.sum()):
        deviation = np.sqrt(share * (1 - share) * len(indices))
        assert counts.get(value, 0) == pytest.approx(share * len(indices), abs=5 * deviation)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "other")]

    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        generate(folder, generator_seed=seed)

    first, second, other = map(files, folders)
    assert first == second
    unchanged = {name for name in first if first[name] == other[name]}
    assert {name for name in unchanged if name.endswith(".npy")} == {
        "train/group.npy",
        "test/group.npy",
    }


def test_settings_of_the_training_do_not_change_the_log(tmp_path):
    generate(tmp_path / "log")
    before = files(tmp_path / "log")
    changes = {"batch_size": 7, "seed": 5, "split_seed": 5, "validation_share": 0.5}

    Synthetic(**SETTINGS | {"dir": tmp_path / "log"} | changes).prepare()

    assert files(tmp_path / "log") == before


def test_global_random_streams_are_unchanged(tmp_path):
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    generate(tmp_path / "log")

    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
    assert np.random.get_state()[2:] == numpy_state[2:]  # noqa: NPY002


@pytest.mark.parametrize("searches_per_chunk", [100, 8192])
def test_searches_are_complete_and_in_one_split(tmp_path, monkeypatch, searches_per_chunk):
    monkeypatch.setattr(synthetic, "_SEARCHES_PER_CHUNK", searches_per_chunk)

    manifest, _ = generate(tmp_path / "log", rows=2009, rows_per_search=4)

    _, arrays = open_prepared(tmp_path / "log")
    groups = [arrays[split]["group"] for split in ("train", "test")]
    # 503 searches, the last one of a single row; 75 % of them train.
    assert manifest.rows == {"train": 4 * 377, "test": 4 * 125 + 1}
    np.testing.assert_array_equal(np.concatenate(groups), np.arange(2009) // 4)
    assert not set(groups[0]) & set(groups[1])


def test_no_chunk_repeats_another(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_SEARCHES_PER_CHUNK", 100)

    _, log = generate(tmp_path / "log", rows=600)

    chunks = np.split(log["numerical"], 3)
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(chunks, 2))


def test_rows_of_a_search_share_their_user(log):
    same = np.diff(log["group"]) == 0

    assert (np.diff(log["categorical"][:, :3], axis=0)[same] == 0).all()
    assert (np.diff(log["numerical"][:, :2], axis=0)[same] == 0).all()
    assert (np.diff(log["categorical"][:, 3], axis=0)[same] != 0).any()
    assert (np.diff(log["numerical"][:, 2], axis=0)[same] != 0).any()


def test_vocabularies_are_those_of_the_training_rows(tmp_path):
    manifest, _ = generate(tmp_path / "log")

    _, arrays = open_prepared(tmp_path / "log")
    for column, field in enumerate(manifest.schema.categorical):
        values = np.unique(arrays["train"]["categorical"][:, column])
        np.testing.assert_array_equal(values, np.arange(1, field.vocabulary_size))
    assert (arrays["test"]["categorical"] == 0).any()


def test_prepares_itself_in_a_missing_or_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()

    for directory in (tmp_path / "absent", tmp_path / "empty"):
        datamodule = Synthetic(**SETTINGS, dir=directory)
        datamodule.prepare_data()
        datamodule.setup()

        assert sum(datamodule.split_rows.values()) == 2001


def test_an_earlier_log_of_the_same_settings_is_reused(tmp_path):
    generate(tmp_path / "log")
    before = (tmp_path / "log" / "schema.json").stat()

    Synthetic(**SETTINGS, dir=tmp_path / "log").prepare_data()

    assert (tmp_path / "log" / "schema.json").stat() == before


def test_an_earlier_log_of_other_settings_is_refused_and_kept(tmp_path):
    generate(tmp_path / "log")
    before = files(tmp_path / "log")
    other = Synthetic(**SETTINGS | {"dir": tmp_path / "log", "rank": 4, "click_rate": 0.1})

    message = (
        f"{tmp_path / 'log'} holds a synthetic data set with different settings "
        r"\(rank: 3 there, 4 here; click_rate: 0\.3 there, 0\.1 here\)\. Choose another data\.dir, "
        r"leave out or correct these settings, or prepare it again"
    )
    with pytest.raises(InputError, match=message):
        other.prepare_data()

    assert files(tmp_path / "log") == before


def test_preparing_again_replaces_a_log_of_other_settings(tmp_path):
    generate(tmp_path / "log")
    other = Synthetic(**SETTINGS | {"dir": tmp_path / "log", "rank": 4})

    other.prepare()
    other.prepare_data()


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match=r"is not a prepared data set\. Choose another data"):
        Synthetic(**SETTINGS, dir=tmp_path).prepare_data()

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_log_is_refused(tmp_path):
    generate(tmp_path / "log")
    path = tmp_path / "log" / "train" / "labels.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")

    with pytest.raises(InputError, match="was changed or damaged"):
        Synthetic(**SETTINGS, dir=tmp_path / "log").prepare_data()


@pytest.mark.parametrize(
    ("name", "fields", "features"), [("synthetic", 16, 63), ("synthetic_ali_ccp", 18, 0)]
)
def test_the_configured_logs_have_the_shape_of_their_model(make_datamodule, name, fields, features):
    datamodule = make_datamodule(name, "rows=2000", "rows_per_search=2")

    datamodule.prepare_data()
    datamodule.setup()

    batch = next(iter(datamodule.train_dataloader()))
    assert batch.categorical.shape == (1280, fields)
    assert batch.numerical.shape == (1280, features)
    assert batch.numerical.isfinite().all()
    assert sum(datamodule.split_rows.values()) == 2000
    assert datamodule.column("train", "probabilities").shape == (1280, 2)


def test_the_ali_ccp_shape_has_large_vocabularies(make_datamodule):
    datamodule = make_datamodule("synthetic_ali_ccp", "rows=2000", "vocabulary_scale=1.0")

    assert max(datamodule.sizes) == 467_297  # field 205 at AITM's cut-off
    assert sum(datamodule.sizes) == pytest.approx(1.3e6, rel=0.05)


def test_small_vocabularies_are_not_scaled(tmp_path):
    sizes = [4, 99, 100, 101, 3000, 50_000]

    datamodule = Synthetic(
        **SETTINGS | {"dir": tmp_path, "vocabulary_sizes": sizes, "vocabulary_scale": 0.05}
    )

    assert datamodule.sizes == [4, 99, 100, 100, 150, 2500]
    assert datamodule.vocabulary_sizes == sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": -1}, "data.rows must be an integer >= 1, got -1"),
        ({"rows": 0}, "data.rows must be an integer >= 1, got 0"),
        ({"rows": 1e5}, "data.rows must be an integer >= 1, got 100000.0"),
        ({"rows_per_search": 0}, "data.rows_per_search must be an integer >= 1, got 0"),
        ({"rank": 1}, "data.rank must be an integer >= 2, got 1"),
        ({"user_fields": -1}, "data.user_fields must be an integer >= 0, got -1"),
        ({"user_fields": 6}, r"data\.user_fields and .* must not exceed .*, got 6 of 5 and 2 of 6"),
        ({"user_numerical_features": 7}, "must not exceed .*, got 3 of 5 and 7 of 6"),
        ({"numerical_features": -2}, "data.numerical_features must be an integer >= 0, got -2"),
        ({"vocabulary_sizes": [3, 0]}, "data.vocabulary_sizes must be an integer >= 1, got 0"),
        ({"vocabulary_sizes": ["big"]}, "data.vocabulary_sizes must be an integer >= 1, got 'big'"),
        ({"vocabulary_sizes": 8}, "data.vocabulary_sizes must be a list of sizes, got 8"),
        ({"vocabulary_sizes": None}, "data.vocabulary_sizes must be a list of sizes, got None"),
        ({"vocabulary_scale": 0}, r"data.vocabulary_scale must be a number in .*1\], got 0"),
        ({"vocabulary_scale": 1.5}, r"data.vocabulary_scale must be a number in .*1\], got 1.5"),
        ({"test_share": 0}, r"data.test_share must be a number in \[1e-09, 1\), got 0"),
        ({"test_share": 1}, r"data.test_share must be a number in \[1e-09, 1\), got 1"),
        ({"click_rate": 0.0}, r"data.click_rate must be a number in \[1e-09, 1\), got 0.0"),
        ({"click_rate": 1.0}, r"data.click_rate must be a number in \[1e-09, 1\), got 1.0"),
        ({"click_rate": "5%"}, r"data.click_rate must be a number in \[1e-09, 1\), got '5%'"),
        ({"conversion_rate": -0.1}, r"data.conversion_rate must be a number in .*, got -0.1"),
        ({"conversion_rate": 1.1}, r"data.conversion_rate must be a number in .*, got 1.1"),
        ({"click_spread": -1}, r"data.click_spread must be a number in \[0, inf\), got -1"),
        ({"conversion_spread": np.inf}, r"data.conversion_spread must be .*, got inf"),
        ({"skew": float("nan")}, r"data.skew must be a number in \[0, inf\), got nan"),
        ({"task_correlation": 1.1}, r"data.task_correlation must be a number in \[0, 1\], got 1.1"),
        ({"interaction": -0.1}, r"data.interaction must be a number in \[0, 1\], got -0.1"),
        ({"hidden_units": 257}, "data.hidden_units must be an integer from 0 to 256, got 257"),
        (
            {"hidden_units": 1},
            "data.hidden_units must be 0 or at least 3, got 1. Set data.hidden_units=32.",
        ),
        ({"relatedness": 1.5}, r"data.relatedness must be a number in \[0, 1\], got 1.5"),
        (
            {"relatedness": 0.5},
            "data.relatedness must be 1 without hidden layers, got 0.5. Set data.hidden_units=32.",
        ),
        ({"generator_seed": -1}, "data.generator_seed must be an integer >= 0, got -1"),
        ({"batch_size": True}, "data.batch_size must be an integer >= 1, got True"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Synthetic(**SETTINGS | {"dir": Path("log")} | changes)
