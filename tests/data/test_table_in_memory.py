"""Tables in memory are prepared as the Parquet files that hold them are."""

import copy
import datetime as dt
import gc
import hashlib
import pickle
from decimal import Decimal

import lightning as L
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtnrec.checks import InputError
from mtnrec.data.prepared.manifest import NotPreparedError
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.raw import tabular
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.tabular import FileSource, FrameSource, open_source
from mtnrec.data.table import Table

ROWS = 300
ROLES = {"labels": ["click", "conversion"], "funnel": True, "fill": "mean"}


def draw(rows=ROWS, seed=0):
    """Columns of the types that pandas has for texts, integers, numbers, booleans and dates."""
    rng = np.random.default_rng(seed)
    click = rng.integers(0, 2, rows)
    gaps = rng.random(rows) < 0.2
    texts = rng.choice(["Rome, Italy", "Łódź", "", "x" * 40], rows).astype(object)
    texts[gaps] = None
    numbers = rng.lognormal(0, 3, rows)
    return pd.DataFrame(
        {
            "object_text": texts,
            "text": pd.array(texts, dtype="string"),
            "category": pd.Categorical(texts, categories=["never", *sorted(set(texts[~gaps]))]),
            "integer_category": pd.Categorical(rng.integers(5, 9, rows)),
            "nullable_integer": pd.array(np.where(gaps, None, click * 7), dtype="Int64"),
            "nullable_boolean": pd.array(np.where(gaps, None, click == 1), dtype="boolean"),
            "nullable_number": pd.array(np.where(gaps, None, numbers), dtype="Float32"),
            "many": rng.integers(0, 40, rows).astype(np.uint32),
            "number": np.where(gaps, np.nan, numbers),
            "half": rng.integers(0, 9, rows).astype(np.float16) / 4,
            "empty_text": np.where(gaps, "", "full"),
            "user": [f"u{user}" for user in rng.integers(0, 30, rows)],
            "time": pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.permutation(rows), "h"),
            "click": click == 1,
            "conversion": click & rng.integers(0, 2, rows),
        }
    )


TYPES_OF_POLARS = {
    "object_text": pl.Categorical,
    "text": pl.Enum(["Rome, Italy", "Łódź", "", "x" * 40]),
    "many": pl.Int64,
    "nullable_integer": pl.Int8,
    "nullable_number": pl.Decimal(20, 6),
    "time": pl.Date,
}


def as_polars(frame):
    converted = pl.from_pandas(frame, nan_to_null=False).cast(TYPES_OF_POLARS)
    return pl.concat([converted[:100], converted[100:]], rechunk=False)


def as_pyarrow(frame):
    parts = (pa.Table.from_pandas(part, preserve_index=False) for part in (frame[:7], frame[7:]))
    return pa.concat_tables(parts)


KINDS = {
    "pandas": (lambda frame: frame, lambda frame, path: frame.to_parquet(path, index=False)),
    "polars": (as_polars, lambda frame, path: frame.write_parquet(path)),
    "pyarrow": (as_pyarrow, lambda frame, path: pq.write_table(frame, path)),
}


def prepared_bytes(directory):
    """Arrays and vocabularies; and the schema but for the parameters."""
    manifest, _ = open_prepared(directory)
    entries = manifest.schema, manifest.rows, manifest.transforms, manifest.missing
    paths = [path for path in sorted(directory.rglob("*")) if path.suffix in (".npy", ".parquet")]
    assert len(paths) > 10
    return entries, {path.relative_to(directory): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_per_chunk", [64, 1 << 16])
def test_the_prepared_bytes_are_those_of_the_parquet_file(
    tmp_path, monkeypatch, kind, rows_per_chunk
):
    monkeypatch.setattr(tabular, "_ROWS_PER_CHUNK", rows_per_chunk)
    convert, write = KINDS[kind]
    frames = {"train": convert(draw()), "test": convert(draw(80, seed=1))}
    paths = {split: tmp_path / f"{split}.parquet" for split in frames}
    for split, frame in frames.items():
        write(frame, paths[split])
    settings = {"group": "user", "time": "time", "standardise": True, "min_count": 2}

    Table(**paths, **ROLES, **settings, dir=tmp_path / "file").prepare()
    Table(**frames, **ROLES, **settings, dir=tmp_path / "frame").prepare()

    assert prepared_bytes(tmp_path / "frame") == prepared_bytes(tmp_path / "file")


@pytest.mark.parametrize(
    "index",
    [
        np.arange(ROWS)[::-1],
        pd.Index(np.arange(ROWS) * 0.5, name="many"),
        pd.MultiIndex.from_product([range(3), range(100)], names=["click", None]),
        pd.date_range("2020-01-01", periods=ROWS, name="day"),
    ],
    ids=["reversed", "name of a column", "two levels", "dates"],
)
def test_an_index_of_pandas_is_ignored(tmp_path, index):
    frame = draw()

    Table(train=frame, **ROLES, exclude=["time"], dir=tmp_path / "plain").prepare()
    Table(train=frame.set_axis(index), **ROLES, exclude=["time"], dir=tmp_path / "other").prepare()

    assert prepared_bytes(tmp_path / "other") == prepared_bytes(tmp_path / "plain")


def test_integer_names_of_pandas_columns_are_their_digits(tmp_path):
    frame = pd.DataFrame({0: np.arange(50) / 2, 1: np.arange(50) % 2})

    manifest = Table(train=frame, labels=[1], dir=tmp_path / "set").prepare()

    assert (manifest.schema.numerical, manifest.schema.labels) == (("0",), ("1",))


class Foreign:
    """A frame of an unknown library, which streams its rows anew each time it is asked."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize("wrap", [Foreign, pa.Table.to_reader])
def test_any_arrow_stream_is_a_frame(tmp_path, wrap):
    frame = as_pyarrow(draw())

    Table(train=frame, **ROLES, time="time", dir=tmp_path / "plain").prepare()
    stream = Table(train=wrap(frame), **ROLES, time="time", dir=tmp_path / "stream")
    stream.prepare_data()
    stream.prepare_data()

    assert prepared_bytes(tmp_path / "stream") == prepared_bytes(tmp_path / "plain")
    assert stream.find_checksum() == open_prepared(tmp_path / "plain")[0].checksum


def test_a_file_and_a_frame_go_together(tmp_path):
    frame = draw()
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    paths = {"train": tmp_path / "rows.parquet", "test": tmp_path / "rows.parquet"}

    Table(**paths, **ROLES, time="time", dir=tmp_path / "files").prepare()
    for key in ("train", "test"):
        mixed = Table(**paths | {key: frame}, **ROLES, time="time", dir=tmp_path / key)
        mixed.prepare_data()

        assert prepared_bytes(tmp_path / key) == prepared_bytes(tmp_path / "files")


@pytest.mark.parametrize(
    "column",
    [pd.period_range("2024-01", periods=80, freq="D"), pd.cut(pd.Series(range(80)), 3)],
)
def test_extension_types_of_pandas_are_refused(column):
    rows = pd.DataFrame({"day": column, "x": np.arange(80) / 2, "click": [0, 1] * 40})

    with pytest.raises(InputError, match="the column 'day' is of type"):
        Table(train=rows, labels=["click"]).prepare()


LISTS = pl.Series("tags", [["a", "b"], ["b"], None, []] * 60)


def with_column(column):
    x = pl.Series("x", np.arange(240) % 7 / 2)
    return pl.DataFrame([column.alias("tags"), x, pl.Series("click", [0, 1] * 120)])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (LISTS, pl.Series(["a"] * 240), "column 'tags' must hold lists, .* got String"),
        (pl.Series(["a", "b"] * 120), LISTS, "the column 'tags' is of type List"),
        (pl.Series([1, 2] * 120), LISTS, "the column 'tags' is of type List"),
        (pl.Series([1.5, 2.5] * 120), LISTS, "the column 'tags' is of type List"),
    ],
)
def test_lists_in_one_of_train_and_test_alone_are_refused(train, test, message):
    data = Table(train=with_column(train), test=with_column(test), labels=["click"])

    with pytest.raises(InputError, match=message):
        data.prepare()


def test_a_column_of_lists_that_are_all_missing_is_one_of_empty_lists():
    data = Table(
        train=with_column(LISTS), test=with_column(pl.Series([None] * 240)), labels=["click"]
    )

    manifest = data.prepare()

    assert [field.name for field in manifest.schema.multivalued] == ["tags"]
    assert manifest.missing["test"]["tags"] == 240


def test_constants_alone_make_a_data_set():
    table = Table(train=draw().drop(columns=["time"]), **ROLES)

    table.prepare_data()
    table.setup()

    assert sum(table.split_rows.values()) == ROWS
    assert next(iter(table.train_dataloader())).labels.shape[1] == 2


def test_a_temporary_folder_lives_as_long_as_its_table():
    table = Table(train=draw(), **ROLES, time="time")
    folder = table.dir
    assert table.find_checksum() is None

    checksum = table.prepare().checksum

    assert table.find_checksum() == checksum
    assert folder.name == "table"
    del table
    gc.collect()
    assert not folder.parent.exists()


def test_a_given_folder_is_kept(tmp_path):
    table = Table(train=draw(), **ROLES, time="time", dir=tmp_path / "mine")
    checksum = table.prepare().checksum
    del table
    gc.collect()

    assert Table(dir=tmp_path / "mine").find_checksum() == checksum


@pytest.mark.filterwarnings("ignore:.*no `validation_step`")
@pytest.mark.parametrize("calls", [[], ["prepare_data"], ["prepare_data", "setup"], ["setup"]])
@pytest.mark.parametrize("temporary", [True, False])
def test_lightning_prepares_and_sets_up_whatever_was_called_before(tmp_path, calls, temporary):
    class Network(L.LightningModule):
        rows = 0

        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))

        def training_step(self, batch, _):
            self.rows += len(batch.labels)
            return (self.bias - batch.labels).square().mean()

        def validation_step(self, batch, _):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    settings = {} if temporary else {"dir": tmp_path / "set"}
    table = Table(train=draw(), **ROLES, time="time", verify=True, **settings)
    if temporary or calls != ["setup"]:
        for call in calls:
            getattr(table, call)()
    else:
        with pytest.raises(NotPreparedError, match=r"no prepared data set in .*set\n.*\n.*Call"):
            table.setup()
    network = Network()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    trainer.fit(network, datamodule=table)

    assert network.rows == table.split_rows["train"] == 192


@pytest.mark.parametrize("is_prepared", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "make_copy",
    [
        pytest.param(copy.deepcopy, marks=pytest.mark.slow),
        copy.copy,
        lambda t: pickle.loads(pickle.dumps(t)),
    ],
)
def test_copies_have_their_own_folder(make_copy, is_prepared):
    table = Table(train=draw(), **ROLES, time="time")
    if is_prepared:
        table.prepare_data()
        table.setup()
    other = make_copy(table)

    assert other.dir != table.dir
    del table
    gc.collect()
    other.prepare_data()
    other.setup()
    assert sum(other.split_rows.values()) == ROWS
    assert other.find_checksum() is not None


def test_a_changed_frame_of_the_same_size_is_refused(tmp_path):
    frame, folder = draw(), tmp_path / "set"
    settings = {**ROLES, "time": "time", "dir": folder}
    Table(train=frame, **settings).prepare_data()
    before = (folder / "schema.json").stat()

    Table(train=frame.copy(), **settings).prepare_data()
    assert (folder / "schema.json").stat() == before
    frame.loc[17, "many"] += 1

    message = rf"{folder} holds a table data set with different settings \(train: other .*Choose"
    with pytest.raises(InputError, match=message):
        Table(train=frame, **settings).prepare_data()
    Table(train=frame, **settings).prepare()
    Table(train=frame, **settings).prepare_data()


def identity(frame):
    return FrameSource("data.train", frame).identity(str)


def test_the_identity_of_a_frame_is_its_content_whatever_its_memory_layout():
    frame = draw()
    rows = pl.from_pandas(frame, nan_to_null=False)
    more = pl.concat([rows[5:9], rows, rows[:3]], rechunk=True)

    expected = identity(rows)

    assert expected[0][0] == "sha256"
    assert identity(pl.concat([rows[:50], rows[50:]], rechunk=False)) == expected
    assert identity(more[4:-3]) == expected
    assert identity(rows.to_arrow()) == expected
    assert identity(pl.DataFrame({"x": ["b", None]}, schema={"x": pl.Categorical})) == identity(
        pl.DataFrame({"x": ["b", None]})
    )
    under_null = pa.Array.from_buffers(
        pa.int64(), 3, [pa.py_buffer(b"\x05"), pa.py_buffer(np.array([1, 99, 3]).tobytes())]
    )
    assert identity(pa.table({"x": under_null})) == identity(pa.table({"x": [1, None, 3]}))


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.rename({"many": "some"}),
        lambda frame: frame.select("text", "many"),
        lambda frame: frame.reverse(),
        lambda frame: frame.cast({"many": pl.Int32}),
        lambda frame: frame.with_columns(many=frame["many"].set(frame["many"] == 7, None)),
        lambda frame: frame.with_columns(text=frame["text"].fill_null("")),
    ],
    ids=["name", "order of columns", "order of rows", "type", "missing", "empty"],
)
def test_the_identity_of_a_frame_changes_with_its_content(change):
    frame = pl.DataFrame({"many": [3, 7, 9], "text": ["a", None, ""]})

    assert identity(change(frame)) != identity(frame)


def test_the_identity_of_a_frame_is_the_hash_of_an_arrow_stream_of_each_column():
    frame = pl.DataFrame({"x": [1.5, None], "y": ["a", "b"]})
    expected = hashlib.sha256()
    for table in (
        pa.table({"x": [1.5, None]}),
        pa.table({"y": pa.array(["a", "b"], pa.large_string())}),
    ):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        expected.update(sink.getvalue())

    assert identity(frame) == [["sha256", expected.hexdigest()]]


BAD_FRAMES = {
    "pandas, twice": (
        pd.DataFrame([[1, 2, 3]], columns=["x", "click", "x"]),
        "the frame of data.train names the column 'x' twice",
    ),
    "pandas, an integer and its digit": (
        pd.DataFrame([[1, 2, 3]], columns=[1, "click", "1"]),
        "the frame of data.train names the column '1' twice",
    ),
    "pyarrow, twice": (
        pa.table([[1], [2]], names=["click", "click"]),
        "the frame of data.train names the column 'click' twice",
    ),
    "pandas, no name": (
        pd.DataFrame([[1, 2]], columns=["click", None]),
        "the frame of data.train: column 2 has no name",
    ),
    "polars, no name": (
        pl.DataFrame({"": [1], "click": [1]}),
        "the frame of data.train: column 1 has no name",
    ),
    "pandas, no rows": (draw()[:0], "the frame of data.train has no rows"),
    "polars, no rows": (pl.DataFrame({"click": []}), "the frame of data.train has no rows"),
    "no columns": (pd.DataFrame(), "the frame of data.train has no rows"),
    "mixed": (
        pd.DataFrame({"x": [1, "a"], "click": [0, 1]}),
        "the frame of data.train cannot be read as Arrow data .*Turn its columns into numbers",
    ),
    "objects": (
        pl.DataFrame({"x": [object()], "click": [0]}),
        "the frame of data.train: the column 'x' is of type Binary. Leave it out",
    ),
    "a column": (pl.Series("click", [0, 1]), "cannot be read as Arrow data .*non-struct type"),
    "intervals": (
        pa.table({"x": pa.array([(1, 2, 3)], pa.month_day_nano_interval()), "click": [0]}),
        "cannot be read as Arrow data .*month_day_nano_interval",
    ),
    "lists of lists": (
        pl.DataFrame({"x": [[[1]], [[2]]], "click": [0, 1]}),
        r"the frame of data.train: the column 'x' is of type List\(List\(Int64\)\)\. Leave it out",
    ),
    "bytes": (
        pl.DataFrame({"x": [b"a", b"b"], "click": [0, 1]}),
        r"the frame of data.train: the column 'x' is of type Binary. Leave it out",
    ),
    "no label": (
        pl.DataFrame({"x": [1, 2]}),
        "the frame of data.train lacks the column 'click' of data.labels; it has 'x'",
    ),
    "a bad row": (
        pl.DataFrame({"x": [1, 2, 3], "click": [0, 1, 2]}),
        "the frame of data.train, row 3, column 'click': a label must be 0 or 1 .* got 2",
    ),
    "only missing": (
        pl.DataFrame({"x": [None, None], "click": [0, 1]}),
        "the frame of data.train: the column 'x' must have a value in some row, got none",
    ),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_a_bad_frame_is_refused_and_leaves_nothing(case, tmp_path):
    frame, message = BAD_FRAMES[case]

    with pytest.raises(InputError, match=message):
        Table(train=frame, labels=["click"], dir=tmp_path / "data" / "set").prepare()

    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("key", ["train", "test"])
@pytest.mark.parametrize(
    "value", [{"click": [0]}, [[0, 1]], np.zeros((3, 2)), 3, pl.LazyFrame({"click": [0]})]
)
def test_a_table_that_is_neither_path_nor_frame_is_refused_at_once(key, value):
    kind = type(value).__name__

    with pytest.raises(
        InputError, match=rf"data.{key} must be a path .* or a frame .*object of type {kind}$"
    ):
        Table(**{"train": draw(), key: value}, labels=["click"])


def test_the_printed_kinds_are_those_of_the_file(tmp_path, capsys):
    frame = draw()
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    printed = []

    for train in (frame, tmp_path / "rows.parquet"):
        Table(train=train, **ROLES, time="time").prepare()
        lines = capsys.readouterr().out.splitlines()
        printed.append(
            [line for line in lines if "rows.parquet" not in line and "frame" not in line]
        )

    assert printed[0] == printed[1]
    assert any("object_text" in line for line in printed[0])


def test_lists_are_read_if_requested():
    frame = pl.DataFrame({"x": [[1], [2, 3]], "click": [0, 1]})
    source = open_source("table", frame)

    chunks = list(source.chunks(["x"], BadRows("refuse"), lists=["x"]))

    assert [chunk.frame["x"].to_list() for chunk in chunks] == [[[1], [2, 3]]]
    assert chunks[0].place(1) == "the frame of table, row 2"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([Decimal("1.50"), None]),
        pa.array([dt.date(2020, 1, 1), None]),
        pa.array([dt.date(2020, 1, 1), None], pa.date64()),
        pa.array([1, None], pa.timestamp("ns", "Europe/Rome")),
        pa.array(["a", None], pa.string_view()),
        pa.array([1.5, None, float("nan")]).dictionary_encode(),
        pa.array([True, None]).dictionary_encode(),
        pa.nulls(3),
    ],
    ids=lambda column: str(column.type),
)
def test_each_type_is_read_as_from_parquet(column, tmp_path):
    table = pa.table({"x": column})
    pq.write_table(table, tmp_path / "rows.parquet")
    sources = [
        FileSource("data.train", tmp_path / "rows.parquet"),
        FrameSource("data.train", table),
    ]

    (of_file,), (of_frame,) = (list(s.chunks(["x"], BadRows("refuse"))) for s in sources)

    assert of_frame.frame.schema == of_file.frame.schema
    assert of_frame.frame.equals(of_file.frame)
