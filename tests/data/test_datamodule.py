"""Splits, batches and ranks: which row is where, and how often."""

import json
import logging
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.data.aliexpress import AliExpress
from mtnrec.data.prepared.manifest import NotPreparedError
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.samplers import EvaluationSampler, TrainSampler

LOADING = {
    "name": "aliexpress_nl",
    "batch_size": 4,
    "validation_share": 0.2,
    "validation_split": "random",
    "split_seed": 0,
    "seed": 0,
    "verify": True,
}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "data" / "tiny"


@pytest.fixture
def make(directory, write_tiny):
    """Set a DataModule up on 101 training and 13 test rows that know their number."""
    write_tiny(directory, train=101, test=13)

    def make(*, rank=None, world_size=1, **changes):
        datamodule = build(directory, **changes)
        if rank is not None:
            datamodule.trainer = SimpleNamespace(
                global_rank=rank,
                world_size=world_size,
                strategy=SimpleNamespace(root_device=torch.device("cpu")),
            )
        datamodule.prepare_data()
        datamodule.setup("fit")
        return datamodule

    return make


def build(directory, **changes):
    own = {
        "dir": directory,
        "country": "nl",
        "raw_dir": None,
        "conversion_without_click": "refuse",
        "on_error": "refuse",
    }
    return AliExpress(**LOADING | own | changes)


def row_numbers(loader):
    """The rows of each batch, by the number that the first feature holds."""
    return [batch.numerical[:, 0].int().tolist() for batch in loader]


def flat(batches):
    return [row for batch in batches for row in batch]


def train_batches(datamodule, epoch=0):
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return row_numbers(loader)


def test_every_training_row_trains_or_validates(make):
    datamodule = make()

    train, validation = train_batches(datamodule), row_numbers(datamodule.val_dataloader())

    assert sorted(flat(train) + flat(validation)) == list(range(101))
    assert flat(row_numbers(datamodule.test_dataloader())) == list(range(13))
    assert datamodule.split_rows == {"train": 81, "val": 20, "test": 13}


@pytest.mark.parametrize(("share", "rows"), [(0.01, 1), (0.5, 50), (0.333, 34), (0.99, 100)])
def test_the_share_of_the_training_rows_validates(make, share, rows):
    assert make(validation_share=share).split_rows["val"] == rows


def test_validation_rows_are_drawn_from_everywhere(make):
    validation = flat(row_numbers(make(validation_share=0.5).val_dataloader()))

    # Hypergeometric: 50 of 101 rows, the first 50 among them 24.8 times on average.
    early = sum(row < 50 for row in validation)
    assert abs(early - 24.8) < 5 * np.sqrt(50 * 0.495 * 0.505 * 51 / 100)


def test_the_split_is_a_function_of_its_seed_alone(make):
    reference = row_numbers(make().val_dataloader())

    for changes in ({"seed": 7}, {"rank": 0}, {"verify": False}):
        assert row_numbers(make(**changes).val_dataloader()) == reference
    assert flat(row_numbers(make(batch_size=7).val_dataloader())) == flat(reference)
    assert flat(row_numbers(make(split_seed=1).val_dataloader())) != flat(reference)


def test_a_batch_holds_the_rows_of_every_array(make, directory):
    _, arrays = open_prepared(directory)
    datamodule = make()

    for loader, split in (
        (datamodule.train_dataloader(), "train"),
        (datamodule.val_dataloader(), "train"),
        (datamodule.test_dataloader(), "test"),
    ):
        for batch in loader:
            rows = batch.numerical[:, 0].long().numpy()
            for stem in ("categorical", "numerical", "labels", "group"):
                found = getattr(batch, stem).numpy()
                np.testing.assert_array_equal(found, arrays[split][stem][rows])
            types = (torch.int32, torch.float32, torch.float32, torch.int64)
            tensors = (batch.categorical, batch.numerical, batch.labels, batch.group)
            assert tuple(tensor.dtype for tensor in tensors) == types


def test_complete_groups_validate(make):
    datamodule = make(validation_split="grouped", validation_share=0.5)

    train, validation = (set(datamodule.column(split, "group")) for split in ("train", "val"))

    assert len(train) == len(validation) == 2
    assert not train & validation
    assert sum(datamodule.split_rows[split] for split in ("train", "val")) == 101


def test_the_last_rows_validate(make):
    validation = flat(row_numbers(make(validation_split="last").val_dataloader()))

    assert validation == list(range(81, 101))


def test_a_row_has_its_bags(directory, write_tiny):
    manifest = write_tiny(directory, train=101, test=13, multivalued=True)
    datamodule = build(directory, batch_size=40)
    datamodule.setup()
    _, arrays = open_prepared(directory)

    for loader, split in (
        (datamodule.train_dataloader(), "train"),
        (datamodule.test_dataloader(), "test"),
    ):
        for batch in loader:
            for column, (field, bags) in enumerate(
                zip(manifest.schema.multivalued, batch.bags, strict=True)
            ):
                parts = (
                    arrays[split][f"bags/{field.name}/{p}"]
                    for p in ("offsets", "tokens", "weights")
                )
                offsets, tokens, weights = parts
                assert len(bags.offsets) == len(batch) + 1
                for row, number in enumerate(batch.numerical[:, 0].long().tolist()):
                    bag = arrays[split]["bag"][number, column]
                    expected = slice(offsets[bag], offsets[bag + 1])
                    found = slice(bags.offsets[row], bags.offsets[row + 1])
                    assert bags.tokens[found].tolist() == tokens[expected].tolist()
                    assert bags.weights[found].tolist() == weights[expected].tolist()


def test_data_without_groups_makes_batches_without_groups(directory, write_tiny):
    write_tiny(directory)
    schema = json.loads((directory / "schema.json").read_text())
    del schema["checksum"]
    for split in ("train", "test"):
        del schema["checksums"][f"{split}/group.npy"]
    (directory / "schema.json").write_text(json.dumps(schema))

    datamodule = build(directory)
    datamodule.setup()

    with pytest.raises(
        InputError, match=r"must have groups for .*=grouped, got none\. Choose random or last"
    ):
        build(directory, validation_split="grouped").setup()
    assert next(iter(datamodule.test_dataloader())).group is None
    assert datamodule.column("test", "group") is None


@pytest.mark.parametrize("batch_size", [1, 4, 27, 81, 1000])
def test_an_epoch_holds_each_training_row_once(make, batch_size):
    datamodule = make(batch_size=batch_size)

    batches = train_batches(datamodule)

    assert len(set(flat(batches))) == len(flat(batches)) == 81
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(datamodule.train_dataloader()) == len(batches)


def test_the_order_is_a_function_of_seed_and_epoch(make):
    datamodule = make()
    first, second = train_batches(datamodule, epoch=0), train_batches(datamodule, epoch=1)

    again = make()

    assert train_batches(again, epoch=1) == second
    assert train_batches(again, epoch=0) == first != second
    assert train_batches(make(seed=1), epoch=0) != first


def test_the_global_random_streams_do_not_matter_and_do_not_move(make):
    first = [rows.tolist() for rows in make().train_dataloader().sampler]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    second = [rows.tolist() for rows in make().train_dataloader().sampler]

    assert second == first
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[2:] == numpy_state[2:]  # noqa: NPY002


def test_the_order_is_numpys_permutation():
    sampler = TrainSampler(1000, 64, 3, 0, 1)
    sampler.set_epoch(2)

    order = np.random.default_rng([3, 2]).permutation(1000)

    np.testing.assert_array_equal(np.concatenate(list(sampler)), order)


def test_a_set_larger_than_memory_gives_the_same_batches(
    directory, write_tiny, monkeypatch, caplog
):
    write_tiny(directory, train=101, test=13, multivalued=True)
    datamodule = build(directory, batch_size=40)
    datamodule.setup()
    expected = list(datamodule.train_dataloader())
    monkeypatch.setattr("mtnrec.data.datamodule.memory_bytes", lambda: 1000)

    with caplog.at_level(logging.INFO):
        found = list(datamodule.train_dataloader())

    assert "are read from disk throughout" in caplog.text
    for batch, other in zip(found, expected, strict=True):
        for part in ("categorical", "numerical", "labels", "group"):
            assert torch.equal(getattr(batch, part), getattr(other, part))
        for bags, others in zip(batch.bags, other.bags, strict=True):
            assert torch.equal(bags.tokens, others.tokens)
            assert torch.equal(bags.offsets, others.offsets)


class Recorder(L.LightningModule):
    """Notes the rows of every batch that Lightning passes to it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_rows, self.val_rows = [], []

    def training_step(self, batch):
        self.train_rows[-1:] = [self.train_rows[-1] + batch.numerical[:, 0].int().tolist()]
        return self.weight * batch.labels.mean()

    def on_train_epoch_start(self):
        self.train_rows.append([])

    def validation_step(self, batch):
        self.val_rows += batch.numerical[:, 0].int().tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_lightning_changes_the_order_each_epoch(make):
    datamodule = make()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    recorder = Recorder()

    trainer.fit(recorder, datamodule=datamodule)

    expected = [flat(train_batches(make(), epoch)) for epoch in range(2)]
    assert recorder.train_rows == expected
    assert recorder.val_rows == 2 * flat(row_numbers(make().val_dataloader()))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("rows", [5, 30, 59, 60, 61])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranks_divide_the_global_batches(rows, batch_size, world_size):
    ranks = []
    for rank in range(world_size):
        sampler = TrainSampler(rows, batch_size, 3, rank, world_size)
        sampler.set_epoch(2)
        ranks.append([batch.tolist() for batch in sampler])
        assert len(sampler) == len(ranks[-1])
    alone = TrainSampler(rows, batch_size * world_size, 3, 0, 1)
    alone.set_epoch(2)

    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert all(own == sizes[0] for own in sizes)
    assert min(map(min, sizes)) > 0
    dealt = [set().union(*parts) for parts in zip(*ranks, strict=True)]
    assert sum(map(len, dealt)) == sum(map(sum, sizes)) == rows - rows % world_size
    for together, one in zip(dealt, alone, strict=False):
        assert together <= set(one.tolist())
    if rows % world_size == 0:
        assert dealt == [set(one.tolist()) for one in alone]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 24, 25, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_evaluation_deals_the_batches_of_one_process_in_order(rows, batch_size, world_size):
    samplers = [EvaluationSampler(rows, batch_size, rank, world_size) for rank in range(world_size)]

    ranks = [[batch.tolist() for batch in sampler] for sampler in samplers]

    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    assert len({len(batches) for batches in ranks}) == 1
    one_after_the_other = [batch for rank in ranks for batch in rank if batch]
    assert flat(one_after_the_other) == list(range(rows))
    assert all(len(batch) == batch_size for batch in one_after_the_other[:-1])
    if world_size == 1:
        assert all(ranks[0])


def test_loaders_deal_to_the_ranks_of_the_trainer(make):
    ranks = [make(rank=rank, world_size=2) for rank in range(2)]

    train = [flat(train_batches(datamodule)) for datamodule in ranks]
    validation = [flat(row_numbers(datamodule.val_dataloader())) for datamodule in ranks]

    assert len(train[0]) == len(train[1]) == 40
    assert not set(train[0]) & set(train[1])
    assert sorted(flat(validation)) == flat(row_numbers(make().val_dataloader()))


def test_an_empty_piece_of_an_evaluation_is_a_batch_without_rows(make):
    datamodule = make(rank=3, world_size=4, batch_size=5)

    *_, last = datamodule.test_dataloader()

    assert len(last) == 0
    assert last.categorical.shape == (0, 3)
    assert last.labels.shape == (0, 2)


def test_more_processes_than_rows_are_refused(make):
    datamodule = make(rank=0, world_size=82)

    with pytest.raises(InputError, match="must have a training row, got 81 rows for 82 processes"):
        datamodule.train_dataloader()


def test_columns_come_in_the_order_of_evaluation(make):
    datamodule = make()

    loaders = {"val": datamodule.val_dataloader(), "test": datamodule.test_dataloader()}
    for split, loader in loaders.items():
        rows = datamodule.column(split, "numerical")[:, 0].astype(int).tolist()
        assert rows == flat(row_numbers(loader))
        labels = torch.cat([batch.labels for batch in loader]).numpy()
        np.testing.assert_array_equal(datamodule.column(split, "labels"), labels)
    assert datamodule.column("train", "probabilities") is None


def test_columns_need_setup(directory):
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        build(directory).column("val", "labels")


def test_absent_data_is_refused_with_its_origin_and_the_command(directory):
    message = (
        rf"no prepared data set in {directory}\n"
        r"(.|\n)*https://tianchi\.aliyun\.com/dataset/74690"
        r"(.|\n)*\nThen: python -m mtnrec\.prepare data=aliexpress_nl data\.raw_dir=DIR$"
    )
    with pytest.raises(NotPreparedError, match=message):
        build(directory).prepare_data()


def test_damage_is_found_by_checksum_by_default(directory, write_tiny):
    write_tiny(directory)
    path = directory / "train" / "numerical.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")

    build(directory, verify=False).prepare_data()

    with pytest.raises(InputError, match=f"{path} has SHA-256 .* Prepare the data set again"):
        build(directory).prepare_data()


def test_a_file_cut_short_is_found_without_checksums(directory, write_tiny):
    write_tiny(directory)
    path = directory / "train" / "numerical.npy"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(InputError, match=r"numerical\.npy has \d+ bytes, but its header says"):
        build(directory, verify=False).prepare_data()


@pytest.mark.parametrize(("train", "test", "share"), [(2, 5, 0.2), (3, 5, 0.9), (20, 0, 0.2)])
def test_too_few_rows_are_refused(directory, write_tiny, train, test, share):
    write_tiny(directory, train=train, test=test)
    datamodule = build(directory, validation_share=share)
    datamodule.prepare_data()

    message = f"share of {share} and test, got {train} training and {test} test rows"
    with pytest.raises(InputError, match=message):
        datamodule.setup()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be an integer >= 1, got 0"),
        ({"batch_size": -8}, "data.batch_size must be an integer >= 1, got -8"),
        ({"batch_size": "big"}, "data.batch_size must be an integer >= 1, got 'big'"),
        ({"batch_size": 8.0}, "data.batch_size must be an integer >= 1, got 8.0"),
        ({"batch_size": None}, "data.batch_size must be an integer >= 1, got None"),
        ({"validation_share": 0}, r"data.validation_share must be above 0, got 0. Validation"),
        ({"validation_share": 1}, r"data.validation_share must be a number in \[0, 1\), got 1"),
        ({"validation_share": -0.1}, r"data.validation_share must be a number in .*, got -0.1"),
        ({"validation_share": "a"}, r"data.validation_share must be a number in .*, got 'a'"),
        ({"split_seed": -1}, "data.split_seed must be an integer >= 0, got -1"),
        ({"seed": None}, "data.seed must be an integer >= 0, got None"),
        ({"verify": "yes"}, "data.verify must be true or false, got 'yes'"),
    ],
)
def test_settings_out_of_range_are_refused(directory, changes, message):
    with pytest.raises(InputError, match=message):
        build(directory, **changes)


def test_a_datamodule_touches_no_file_until_asked(directory):
    build(directory)

    assert not directory.parent.exists()
