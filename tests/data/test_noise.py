"""Which features are replaced, by what, and that nothing but the row decides."""

import hashlib
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare, norm

from mtnrec.batch import Bags, Batch
from mtnrec.checks import InputError
from mtnrec.data.aliexpress import AliExpress
from mtnrec.data.noise import Noise, is_below, scale, splitmix64
from mtnrec.data.prepared.store import open_prepared
from mtnrec.schema import CategoricalField, Schema

TAIL = 1e-6
ROWS = 1000
SPLITS = ("train", "val", "test")
LABELS = ("click", "conversion")


def make_noise(**changes):
    defaults = {"proportion": 1.0, "feature_probability": 1.0, "sampling": "uniform"}
    return Noise(**defaults | {"splits": ["train", "val"], "seed": 0} | changes)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "data" / "tiny"


@pytest.fixture
def make(directory, write_tiny):
    """Set a DataModule up on tiny data with bags; ``noise`` holds the settings of its noise."""
    sizes = {"train": ROWS, "test": 100}

    def make(*, noise, rank=None, world_size=1, **changes):
        if not directory.exists():
            write_tiny(directory, **sizes, multivalued=True)
        loading = {"batch_size": 257, "validation_share": 0.2, "validation_split": "random"}
        own = {"country": "nl", "raw_dir": None, "verify": False}
        own |= {"conversion_without_click": "refuse", "on_error": "refuse"}
        seeds = {"split_seed": 0, "seed": 0}
        settings = {"name": "tiny", "dir": directory} | loading | own | seeds | changes
        datamodule = AliExpress(**settings)
        datamodule.noise = None if noise is None else make_noise(**noise)
        if rank is not None:
            datamodule.trainer = SimpleNamespace(
                global_rank=rank,
                world_size=world_size,
                strategy=SimpleNamespace(root_device=torch.device("cpu")),
            )
        datamodule.setup()
        return datamodule

    return make


def rows_of(datamodule, *splits, epoch=0):
    """The features of each row, as lists, by its number in the prepared file."""
    found = {}
    for split in splits:
        loader = getattr(datamodule, f"{split}_dataloader")()
        if split == "train":
            loader.sampler.set_epoch(epoch)
        for positions, batch in zip(loader.sampler, loader, strict=True):
            numbers = datamodule.row_numbers[split][positions].tolist()
            columns = (batch.categorical, batch.numerical, batch.labels)
            bags = zip(*map(listed, batch.bags), strict=True)
            rows = zip(*(column.tolist() for column in columns), bags, strict=True)
            found |= dict(zip(numbers, rows, strict=True))
    return found


def listed(bags):
    """The tokens and the weights of each bag."""
    tokens, weights, offsets = (getattr(bags, p).tolist() for p in ("tokens", "weights", "offsets"))
    return [(tokens[a:b], weights[a:b]) for a, b in itertools.pairwise(offsets)]


def flat(features):
    """The categorical values, the tokens of each bag and the numerical values of a row."""
    categorical, numerical, _, bags = features
    return [*categorical, *(tokens for tokens, _ in bags), *numerical]


def batch_of(schema, categorical=None, numerical=None, bags=()):
    rows = len(numerical if categorical is None else categorical)
    categorical = np.zeros((rows, 0), np.int32) if categorical is None else categorical
    numerical = np.zeros((rows, 0), np.float32) if numerical is None else numerical
    assert categorical.shape[1] == len(schema.categorical)
    return Batch(torch.from_numpy(categorical), torch.from_numpy(numerical), bags=bags)


def test_splitmix64_gives_the_published_outputs():
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]

    outputs = splitmix64(np.array([1234567], np.uint64), np.arange(3))

    assert outputs.tolist() == expected


def test_thresholds_are_exact():
    bits = np.array([0, 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)

    assert is_below(bits, 0).tolist() == [False] * 6
    assert is_below(bits, 0.5).tolist() == [True, True, True, True, False, False]
    assert is_below(bits, 1).tolist() == [True] * 6


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10**6, 10**12])
def test_all_bits_map_below_the_limit(limit):
    bits = np.array([0, 2**63, 2**64 - 1], np.uint64)

    assert scale(bits, np.array([limit])).tolist() == [0, limit // 2, limit - 1]


@pytest.mark.parametrize("proportion", [0.05, 0.15, 0.5])
def test_the_shares_of_noisy_rows_and_replaced_features_are_binomial(proportion, make):
    clean = rows_of(make(noise=None), "train", "val")

    noisy = rows_of(
        make(noise={"proportion": proportion, "feature_probability": 1}), "train", "val"
    )
    some = rows_of(
        make(noise={"proportion": proportion, "feature_probability": 0.2}), "train", "val"
    )

    noisy_rows = [number for number in clean if noisy[number] != clean[number]]
    assert binomtest(len(noisy_rows), ROWS, proportion).pvalue > TAIL
    changed = np.array(
        [
            [new != old for new, old in zip(flat(some[n]), flat(clean[n]), strict=True)]
            for n in noisy_rows
        ]
    )
    assert {n for n in clean if some[n] != clean[n]} <= set(noisy_rows)
    full = [[bool(tokens) for tokens, _ in clean[n][3]] for n in noisy_rows]
    able = {0: True, 1: True, 3: np.array(full)[:, 0], 4: np.array(full)[:, 1], 5: True, 6: True}
    for column, rows in able.items():  # column 2 has one value, so that few rows can change
        count = int(np.broadcast_to(rows, len(noisy_rows)).sum())
        assert binomtest(int(changed[:, column].sum()), count, 0.2).pvalue > TAIL


@pytest.mark.parametrize("sampling", ["uniform", "empirical"])
def test_everything_that_has_another_value_is_replaced_by_a_valid_one(sampling, make, directory):
    clean = rows_of(make(noise=None), "train", "val")
    manifest, arrays = open_prepared(directory)
    observed = [set(column.tolist()) for column in arrays["train"]["numerical"].T]

    noisy = rows_of(make(noise={"sampling": sampling}), "train", "val")

    for number, (categorical, numerical, labels, bags) in clean.items():
        new_categorical, new_numerical, new_labels, new_bags = noisy[number]
        for field, old, new in zip(
            manifest.schema.categorical, categorical, new_categorical, strict=True
        ):
            others = set(range(1, field.vocabulary_size)) - {old}
            assert new in (others or {old})
        for values, old, new in zip(observed, numerical, new_numerical, strict=True):
            assert new in values - {old}
        for field, (old, weights), (new, new_weights) in zip(
            manifest.schema.multivalued, bags, new_bags, strict=True
        ):
            assert new_weights == weights
            assert len(new) == len(old)
            assert all(1 <= token < field.vocabulary_size for token in new)
            assert all(token != before for token, before in zip(new, old, strict=True))
        assert new_labels == labels


def test_proportion_0_changes_no_bit(make):
    clean, off = make(noise=None), make(noise={"proportion": 0})

    for split in SPLITS:
        loaders = (getattr(d, f"{split}_dataloader")() for d in (clean, off))
        for expected, found in zip(*loaders, strict=True):
            assert expected.categorical.numpy().tobytes() == found.categorical.numpy().tobytes()
            assert expected.numerical.numpy().tobytes() == found.numerical.numpy().tobytes()
            for old, new in zip(expected.bags, found.bags, strict=True):
                for part in ("tokens", "weights", "offsets"):
                    assert torch.equal(getattr(old, part), getattr(new, part))
    record = off.noise.record(off.row_numbers)
    assert record["checksum"] is None
    assert record["noisy_rows"] == record["replaced_features"] == {"train": 0, "val": 0}


def test_feature_probability_0_changes_no_feature(make):
    noise = {"feature_probability": 0}

    assert rows_of(make(noise=noise), *SPLITS) == rows_of(make(noise=None), *SPLITS)


@pytest.mark.parametrize("splits", [["train", "val"], ["train"], ["val"], ["test"], list(SPLITS)])
def test_only_the_chosen_splits_are_noisy(splits, make):
    clean, noisy = make(noise=None), make(noise={"splits": splits})

    for split in SPLITS:
        assert (rows_of(noisy, split) != rows_of(clean, split)) == (split in splits)


def test_the_arrays_of_a_split_stay_clean(make):
    noisy, clean = make(noise={}), make(noise=None)

    list(noisy.val_dataloader())

    for stem in ("categorical", "numerical", "labels"):
        np.testing.assert_array_equal(noisy.column("val", stem), clean.column("val", stem))


def test_the_noise_of_a_smaller_proportion_is_part_of_that_of_a_larger_one(make):
    clean = rows_of(make(noise=None), "train", "val")
    shares = [{"proportion": p, "feature_probability": 0.5} for p in (0.05, 0.1, 0.4, 1)]
    several = [rows_of(make(noise=share), "train", "val") for share in shares]

    sizes = []
    for smaller, larger in itertools.pairwise(several):
        noisy = [number for number in clean if smaller[number] != clean[number]]
        assert [smaller[number] for number in noisy] == [larger[number] for number in noisy]
        sizes.append(len(noisy))
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_the_noise_of_a_row_is_a_function_of_the_row_alone(make):
    noise = {"proportion": 0.3, "feature_probability": 0.3}
    reference = make(noise=noise)
    expected = rows_of(reference, "train", "val")
    assert len(expected) == ROWS

    assert rows_of(reference, "train", "val", epoch=1) == expected
    for changes in (
        {},
        {"batch_size": 64},
        {"seed": 5},
        {"split_seed": 5},
        {"validation_share": 0.5},
        {"validation_split": "last"},
        {"validation_split": "grouped"},
    ):
        assert rows_of(make(noise=noise, **changes), "train", "val") == expected
    ranks = [rows_of(make(noise=noise, rank=r, world_size=2), "train", "val") for r in range(2)]
    assert not ranks[0].keys() & ranks[1].keys()
    assert ranks[0] | ranks[1] == expected
    assert rows_of(make(noise=noise | {"seed": 1}), "train", "val") != expected


def test_each_file_has_its_own_noise():
    noise = make_noise(proportion=0.5, splits=list(SPLITS))
    noise.learn(
        Schema((), ("price",), LABELS, funnel=True),
        {"numerical": np.ones((1, 1), np.float32), "categorical": np.ones((1, 0), np.int32)},
    )

    train, validation, test = (noise.masks(split, np.arange(4000))[0] for split in SPLITS)

    assert train.tolist() == validation.tolist()
    assert binomtest(len(set(train.tolist()) & set(test.tolist())), 4000, 0.25).pvalue > TAIL


def test_the_decisions_are_independent():
    fields = tuple(CategoricalField(f"field_{i}", 5) for i in range(12))
    schema = Schema(fields, (), LABELS, funnel=True)
    arrays = {"categorical": np.ones((1, 12), np.int32), "numerical": np.ones((1, 0), np.float32)}
    rows = np.arange(20_000)
    columns = []
    for seed in (0, 1):
        noise = make_noise(proportion=0.5, feature_probability=0.5, seed=seed)
        everywhere = make_noise(proportion=1, feature_probability=0.5, seed=seed)
        noise.learn(schema, arrays)
        everywhere.learn(schema, arrays)
        noisy = np.isin(rows, noise.masks("train", rows)[0])
        replaced = everywhere.masks("train", rows)[1]
        columns += [noisy, *replaced.T]
    columns += [np.roll(column, lag) for column in columns[:3] for lag in (1, 2, 16)]

    correlations = np.corrcoef(np.array(columns, float))[np.triu_indices(len(columns), 1)]

    bound = norm.isf(TAIL / 2 / len(correlations)) / np.sqrt(len(rows))
    assert np.abs(correlations).max() < bound


COUNTS = {1: 40, 2: 300, 3: 0, 4: 160, 5: 500}
DRAWS = 20_000


def draws_of(kind, sampling, original):
    """New values of one column of ``kind`` whose training values are as often as ``COUNTS``."""
    column = np.repeat(list(COUNTS), list(COUNTS.values()))
    np.random.default_rng(0).shuffle(column)
    noise = make_noise(sampling=sampling)
    field = (CategoricalField("field", 6),)
    arrays = {
        "categorical": np.empty((1000, 0), np.int32),
        "numerical": np.empty((1000, 0), np.float32),
    }
    if kind == "categorical":
        schema = Schema(field, (), LABELS, funnel=True)
        arrays["categorical"] = column[:, None].astype(np.int32)
        batch = batch_of(schema, categorical=np.full((DRAWS, 1), original, np.int32))
        found = batch.categorical
    elif kind == "numerical":
        schema = Schema((), ("price",), LABELS, funnel=True)
        arrays["numerical"] = column[:, None].astype(np.float32)
        batch = batch_of(schema, numerical=np.full((DRAWS, 1), original, np.float32))
        found = batch.numerical
    else:
        # Token 5 lies in one bag that 500 rows share, and so on; the last bag is nobody's.
        schema = Schema((), (), LABELS, funnel=True, multivalued=field)
        arrays |= {
            "bag": column[:, None].astype(np.int32),
            "bags/field/offsets": np.array([0, 0, 1, 2, 3, 4, 5, 7]),
            "bags/field/tokens": np.array([1, 2, 3, 4, 5, 3, 3], np.int32),
        }
        tokens = torch.full((DRAWS,), original, dtype=torch.int32)
        bags = Bags(tokens, torch.ones(DRAWS), torch.arange(0, DRAWS + 1, 4, dtype=torch.int32))
        empty = np.empty((DRAWS // 4, 0), np.int32), np.empty((DRAWS // 4, 0), np.float32)
        batch = batch_of(schema, *empty, bags=(bags,))
        found = bags.tokens
    noise.learn(schema, arrays)
    noise.apply("train", np.arange(len(batch)), batch)
    return found.numpy().ravel()


@pytest.mark.parametrize("original", [0, 2, 3, 5])
@pytest.mark.parametrize("sampling", ["uniform", "empirical"])
@pytest.mark.parametrize("kind", ["categorical", "numerical", "multi-valued"])
def test_new_values_have_the_frequencies_of_the_sampling(kind, sampling, original):
    found = draws_of(kind, sampling, original)

    weights = {value: 1 if sampling == "uniform" else count for value, count in COUNTS.items()}
    if kind == "numerical":
        del weights[3]  # not observed
    weights = {value: w for value, w in weights.items() if value != original and w}
    values, counts = np.unique(found, return_counts=True)
    expected = np.array(list(weights.values())) / sum(weights.values()) * DRAWS
    assert values.tolist() == list(weights)
    assert chisquare(counts, expected).pvalue > TAIL


def test_the_tokens_of_a_bag_are_drawn_one_by_one():
    bags = draws_of("multi-valued", "uniform", 0).reshape(-1, 4)

    for one, other in itertools.combinations(bags.T, 2):
        assert binomtest(int((one == other).sum()), len(bags), 1 / 5).pvalue > TAIL


@pytest.mark.parametrize("kind", ["categorical", "numerical", "multi-valued"])
def test_counts_that_are_too_large_to_list_draw_the_same(kind, monkeypatch):
    expected = draws_of(kind, "empirical", 2)

    monkeypatch.setattr("mtnrec.data.noise._LISTED_TICKETS", 0)

    assert draws_of(kind, "empirical", 2).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["categorical", "multi-valued"])
def test_counting_in_small_chunks_draws_the_same(kind, monkeypatch):
    expected = draws_of(kind, "empirical", 2)

    monkeypatch.setattr("mtnrec.data.noise._ROWS_PER_COUNT", 7)
    monkeypatch.setattr("mtnrec.data.noise._BAGS_PER_COUNT", 2)

    assert draws_of(kind, "empirical", 2).tolist() == expected.tolist()


@pytest.mark.parametrize("sampling", ["uniform", "empirical"])
def test_columns_without_another_value_are_unchanged(sampling):
    sizes = (1, 2, 4, 2)
    fields = tuple(CategoricalField(f"field_{i}", size) for i, size in enumerate(sizes))
    schema = Schema(fields, ("constant", "flag"), LABELS, funnel=True)
    # The third field's training values are all missing: empirically, nothing can replace another.
    categorical = np.tile(np.array([0, 1, 0, 0], np.int32), (50, 1))
    categorical[::2, 3] = 1
    numerical = np.stack([np.full(50, 7.5), np.arange(50) % 2], axis=1).astype(np.float32)
    batch = batch_of(schema, categorical.copy(), numerical.copy())
    noise = make_noise(sampling=sampling)
    noise.learn(schema, {"categorical": categorical, "numerical": numerical})

    noise.apply("train", np.arange(50), batch)

    found = batch.categorical.numpy().T
    assert found[0].tolist() == [0] * 50
    assert found[1].tolist() == [1] * 50
    assert set(found[2].tolist()) == ({1, 2, 3} if sampling == "uniform" else {0})
    assert found[3].tolist() == [1] * 50  # a missing value gets the only one, which itself stays
    assert batch.numerical[:, 0].tolist() == [7.5] * 50
    assert batch.numerical[:, 1].tolist() == (1 - numerical[:, 1]).tolist()


def test_the_values_of_a_long_column_come_from_all_over_it():
    numerical = np.arange(200_000, dtype=np.float32)[:, None]
    schema = Schema((), ("price",), LABELS, funnel=True)
    noise = make_noise()
    noise.learn(schema, {"categorical": np.empty((200_000, 0), np.int32), "numerical": numerical})
    batch = batch_of(schema, numerical=numerical[:DRAWS].copy())

    noise.apply("train", np.arange(DRAWS), batch)

    tenths = np.bincount((batch.numerical.numpy().ravel() // 20_000).astype(int), minlength=10)
    assert chisquare(tenths).pvalue > TAIL


@pytest.mark.parametrize("sampling", ["uniform", "empirical"])
def test_a_batch_without_rows_stays_empty(sampling, make):
    datamodule = make(noise={"sampling": sampling}, rank=15, world_size=16, batch_size=50)

    *_, last = datamodule.val_dataloader()

    assert len(last) == 0
    assert [len(bags.offsets) for bags in last.bags] == [1, 1]


def test_the_global_random_streams_do_not_move(make):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    datamodule = make(noise={"sampling": "empirical"})
    rows_of(datamodule, *SPLITS)
    datamodule.noise.record(datamodule.row_numbers)

    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1][1].tolist()  # noqa: NPY002
    assert np.random.get_state()[2:] == states[1][2:]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_record_counts_and_sums_the_mask(make, monkeypatch):
    settings = {"proportion": 0.3, "feature_probability": 0.4, "splits": ["test", "val"], "seed": 7}
    datamodule = make(noise=settings)
    digest, rows, features = hashlib.sha256(), {}, {}
    for split in ("val", "test"):
        digest.update(split.encode())
        noisy, replaced = datamodule.noise.masks(split, datamodule.row_numbers[split])
        rows[split], features[split] = len(noisy), 0
        for position, mask in zip(noisy.tolist(), replaced.tolist(), strict=True):
            digest.update(int(datamodule.row_numbers[split][position]).to_bytes(8, "little"))
            digest.update(bytes([int("".join(str(int(bit)) for bit in [*mask, False]), 2)]))
            features[split] += sum(mask)

    record = datamodule.noise.record(datamodule.row_numbers)

    counts = {"noisy_rows": rows, "replaced_features": features}
    counts |= {"flipped_labels": {}, "label_flip": None}
    expected = {"sampling": "uniform", "checksum": digest.hexdigest()} | settings | counts
    assert record == expected
    monkeypatch.setattr("mtnrec.data.noise._ROWS_PER_HASH", 13)
    assert datamodule.noise.record(datamodule.row_numbers) == expected
    other = make(noise=settings | {"seed": 8})
    assert other.noise.record(other.row_numbers)["checksum"] != record["checksum"]


def test_the_mask_shows_which_features_change(make):
    datamodule = make(noise={"proportion": 0.3, "feature_probability": 0.4})
    numbers = datamodule.row_numbers["train"]
    new, old = (rows_of(d, "train") for d in (datamodule, make(noise=None)))

    noisy, replaced = datamodule.noise.masks("train", numbers)

    masks = dict(zip(numbers[noisy].tolist(), replaced.tolist(), strict=True))
    for number in old:
        features = zip(flat(old[number]), flat(new[number]), strict=True)
        for column, (before, after) in enumerate(features):
            if masks.get(number, [False] * 7)[column]:
                # The third field has a single value, which stays, as an empty bag does.
                assert before != after or (column, before) == (2, 1) or before == []
            else:
                assert before == after


def test_noise_set_after_the_set_up_is_refused(make):
    datamodule = make(noise=None)
    datamodule.noise = make_noise()

    with pytest.raises(RuntimeError, match=r"set the noise before DataModule\.setup\(\)"):
        next(iter(datamodule.train_dataloader()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proportion": 1.1}, r"noise\.proportion must be a number in \[0, 1\], got 1\.1"),
        ({"proportion": None}, r"noise\.proportion must be a number in \[0, 1\], got None"),
        (
            {"feature_probability": -1},
            r"noise\.feature_probability must be a number in \[0, 1\], got -1",
        ),
        ({"sampling": "other"}, r"noise\.sampling must be one of uniform, empirical; got 'other'"),
        ({"splits": ["dev"]}, r"noise\.splits must be one of train, val, test; got 'dev'"),
        (
            {"splits": []},
            r"noise\.splits must be a list of at least one of train, val, test, got \[\]\. "
            r"Set noise\.proportion=0 to switch the noise off",
        ),
        ({"splits": "train"}, r"noise\.splits must be a list .*, got 'train'"),
        ({"seed": -1}, r"noise\.seed must be an integer >= 0, got -1"),
        (
            {"label_flip": {"click": 2}},
            r"noise\.label_flip\.click must be a number in \[0, 1\], got 2",
        ),
        (
            {"label_flip": 0.1},
            r"noise\.label_flip must have a probability by label, got 0\.1\. Set for example",
        ),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_noise(**changes)


def labels_of(datamodule, *splits, epoch=0):
    """The labels of each row by its number, as the batches have them."""
    rows = rows_of(datamodule, *splits, epoch=epoch)
    return {number: features[2] for number, features in rows.items()}


def flips_of(old, new):
    """The rows and labels that differ; all of them were 1 and are 0."""
    pairs = [(n, label) for n in old for label in (0, 1) if old[n][label] != new[n][label]]
    assert all((old[n][label], new[n][label]) == (1, 0) for n, label in pairs)
    return pairs


@pytest.mark.parametrize(
    ("flip", "shares"),
    [
        ({"conversion": 0.3}, (0, 0.3)),
        ({"click": 0.3}, (0.3, 0.3)),
        ({"click": 0.5, "conversion": 0.4}, (0.5, 0.7)),
        ({"click": 1}, (1, 1)),
        ({"click": 0.0, "conversion": 1}, (0, 1)),
    ],
)
def test_positive_labels_are_flipped_at_their_rate_and_the_funnel_stays(flip, shares, make):
    old = labels_of(make(noise=None), *SPLITS)
    noise = {"proportion": 0, "label_flip": flip, "splits": list(SPLITS)}

    new = labels_of(make(noise=noise), *SPLITS)

    flips = flips_of(old, new)
    for label, share in enumerate(shares):
        positives = sum(int(values[label]) for values in old.values())
        flipped = sum(column == label for _, column in flips)
        assert binomtest(flipped, positives, share).pvalue > TAIL
        assert positives > 0
    assert all(conversion <= click for click, conversion in new.values())


def test_labels_without_a_funnel_are_flipped_apart():
    schema = Schema((), (), ("like", "share"), funnel=False)
    noise = make_noise(proportion=0, label_flip={"like": 1})
    noise.learn(schema, {})
    labels = np.ones((50, 2), np.uint8)

    noise.flip_labels("train", np.arange(50), labels)

    assert labels.sum(axis=0).tolist() == [0, 50]


def test_label_noise_is_a_function_of_seed_row_and_label(make):
    noise = {"proportion": 0, "label_flip": {"click": 0.3, "conversion": 0.5}}
    reference = make(noise=noise)
    expected = labels_of(reference, "train", "val")

    assert labels_of(reference, "train", "val", epoch=1) == expected
    for changes in ({"batch_size": 64}, {"seed": 5}, {"split_seed": 5}, {"validation_share": 0.5}):
        assert labels_of(make(noise=noise, **changes), "train", "val") == expected
    ranks = [labels_of(make(noise=noise, rank=r, world_size=2), "train", "val") for r in range(2)]
    assert ranks[0] | ranks[1] == expected
    features = noise | {"proportion": 0.5, "sampling": "empirical"}
    assert labels_of(make(noise=features), "train", "val") == expected
    one_label = noise | {"label_flip": {"click": 0.3}}
    clicks = labels_of(make(noise=one_label), "train", "val")
    assert [v[0] for v in clicks.values()] == [v[0] for v in expected.values()]
    assert labels_of(make(noise=noise | {"seed": 1}), "train", "val") != expected


def test_label_noise_does_not_move_feature_noise(make):
    noise = {"proportion": 0.3, "feature_probability": 0.4}
    found, expected = (
        rows_of(make(noise=noise | more), "train") for more in ({}, {"label_flip": {"click": 1}})
    )

    for number, (categorical, numerical, _, bags) in expected.items():
        assert (categorical, numerical, bags) == (*found[number][:2], found[number][3])


def test_the_labels_of_a_smaller_flip_probability_are_among_those_of_a_larger_one(make):
    old = labels_of(make(noise=None), "train")
    several = [
        set(flips_of(old, labels_of(make(noise={"label_flip": {"click": p}}), "train")))
        for p in (0.1, 0.3, 0.8)
    ]

    assert several[0] < several[1] < several[2]


def test_each_file_and_each_label_has_its_own_flips_apart_from_the_noisy_rows():
    noise = make_noise(proportion=0.5, splits=list(SPLITS), label_flip={"like": 0.5, "share": 0.5})
    schema = Schema((), ("price",), ("like", "share"), funnel=False)
    noise.learn(schema, {"numerical": np.ones((1, 1), np.float32), "categorical": np.ones((1, 0))})
    rows = np.arange(4000)
    found = []
    for split in SPLITS:
        labels = np.ones((4000, 2), np.uint8)
        noise.flip_labels(split, rows, labels)
        found.append(labels)
    np.testing.assert_array_equal(found[0], found[1])
    noisy = np.isin(rows, noise.masks("train", rows)[0])
    columns = [*found[0].T, *found[2].T, noisy]

    correlations = np.corrcoef(np.array(columns, float))[np.triu_indices(5, 1)]

    assert np.abs(correlations).max() < norm.isf(TAIL / 20) / np.sqrt(4000)


@pytest.mark.parametrize("splits", [["train", "val"], ["train"], ["val"], ["test"]])
def test_only_the_labels_of_the_chosen_splits_are_flipped(splits, make):
    noise = {"proportion": 0, "label_flip": {"click": 1}, "splits": splits}
    noisy, clean = make(noise=noise), make(noise=None)

    for split in SPLITS:
        changed = labels_of(noisy, split) != labels_of(clean, split)
        assert changed == (split in splits)
        assert (noisy.split_labels(split).sum() == 0) == (split in splits)
        np.testing.assert_array_equal(noisy.column(split, "labels"), clean.split_labels(split))


def test_the_labels_of_a_split_are_those_of_its_batches(make, monkeypatch):
    datamodule = make(noise={"proportion": 0, "label_flip": {"click": 0.5, "conversion": 0.5}})
    monkeypatch.setattr("mtnrec.data.noise._ROWS_PER_HASH", 13)

    labels = datamodule.split_labels("val")

    assert labels.tolist() == torch.cat([b.labels for b in datamodule.val_dataloader()]).tolist()
    assert labels.sum() < datamodule.column("val", "labels").sum()


def test_the_record_counts_and_sums_the_flipped_labels(make, monkeypatch):
    settings = {"label_flip": {"click": 0.2, "conversion": 0.5}, "proportion": 0.0, "seed": 7}
    datamodule = make(noise=settings | {"splits": ["test", "val"]})
    digest, counts = hashlib.sha256(), {}
    for split in ("val", "test"):
        digest.update(split.encode())
        old, new = datamodule.column(split, "labels"), datamodule.split_labels(split)
        flipped = old != new
        for number, mask in zip(datamodule.row_numbers[split].tolist(), flipped, strict=True):
            if mask.any():
                digest.update(number.to_bytes(8, "little"))
                digest.update(bytes([128 * int(mask[0]) + 64 * int(mask[1])]))
        counts[split] = dict(zip(LABELS, flipped.sum(axis=0).tolist(), strict=True))

    record = datamodule.record_noise()

    assert record["flipped_labels"] == counts
    assert record["checksum"] == digest.hexdigest()
    assert counts["val"]["click"] > 0
    assert record["noisy_rows"] == {"val": 0, "test": 0}
    both = make(noise=settings | {"proportion": 0.3, "splits": ["val"]}).record_noise()
    alone = make(noise={"proportion": 0.3, "seed": 7, "splits": ["val"]}).record_noise()
    assert both["noisy_rows"] == alone["noisy_rows"]
    assert len({record["checksum"], both["checksum"], alone["checksum"]}) == 3
    monkeypatch.setattr("mtnrec.data.noise._ROWS_PER_HASH", 13)
    assert datamodule.record_noise() == record


def test_an_unknown_label_is_refused(make):
    message = r"noise\.label_flip must name labels of the data \(click, conversion\), got 'buy'"
    with pytest.raises(InputError, match=message):
        make(noise={"label_flip": {"buy": 0.1}})


@pytest.mark.slow
def test_a_run_with_label_noise_tests_on_clean_labels_and_records_it(train):
    log = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
    noisy = [*log, "noise.label_flip={conversion:0.5}", "trainer.max_epochs=1"]

    one, other, clean = (
        json.loads((train(*overrides) / "result.json").read_text())
        for overrides in (noisy, [*noisy, "seed=1"], [*log, "trainer.max_epochs=1"])
    )

    assert one["noise"] == other["noise"]
    assert one["noise"]["flipped_labels"]["train"]["click"] == 0
    for split in ("val", "test"):
        before, after = (r["counts"][f"{split}/ctcvr"]["positives"] for r in (clean, one))
        assert (after < before) == (split == "val")
        if split == "val":
            assert one["noise"]["flipped_labels"]["val"]["conversion"] == before - after
            assert binomtest(before - after, before, 0.5).pvalue > TAIL
    assert one["cell"] != clean["cell"]


@pytest.mark.slow
def test_every_run_on_a_data_set_records_the_same_noise(train):
    log = ["data.rows=3000", "data.click_rate=0.2", "data.conversion_rate=0.3"]
    noisy = [*log, "noise.proportion=0.15", "trainer.max_epochs=1"]

    folders = [
        train(*noisy, model="shared_bottom"),
        train(*noisy, "seed=1"),
        train(*noisy, "noise.seed=1", model="shared_bottom"),
    ]

    one, other_model, other_noise = (
        json.loads((folder / "result.json").read_text()) for folder in folders
    )
    for split, rows in (("train", 1920), ("val", 480)):
        assert binomtest(one["noise"]["noisy_rows"][split], rows, 0.15).pvalue > TAIL
        features = 79 * one["noise"]["noisy_rows"][split]
        assert binomtest(one["noise"]["replaced_features"][split], features, 0.2).pvalue > TAIL
    settings = one["config"]["noise"]
    assert all(one["noise"][key] == settings[key] for key in settings if key != "_target_")
    assert one["noise"] == other_model["noise"]
    assert one["noise"]["checksum"] != other_noise["noise"]["checksum"]
    assert one["cell"] != other_noise["cell"]
    assert one["metrics"] != other_noise["metrics"]
