"""Targets of ``fuzz.py``: inputs and the function that reads them."""

import copy
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import CompactHydraException
from hydra.utils import instantiate
from hypothesis import strategies as st
from omegaconf import OmegaConf
from reference import ali_ccp_log
from rich import get_console

from mtnrec import load_checkpoint
from mtnrec.checkpoint.bundle import model_metadata
from mtnrec.checks import InputError
from mtnrec.command.config import CONF_DIR, lightning_keys, optimizer_keys
from mtnrec.command.errors import find_input_error
from mtnrec.data.ali_ccp import AliCcp
from mtnrec.data.aliexpress import AliExpress
from mtnrec.data.batches import RowGatherer
from mtnrec.data.census_income import CensusIncome
from mtnrec.data.datamodule import DataModule
from mtnrec.data.kuairand import KuaiRand
from mtnrec.data.preparation.aliexpress import CATEGORICAL, LABELS, NUMERICAL
from mtnrec.data.preparation.kuairand import OF_USER
from mtnrec.data.prepared.manifest import Manifest
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import sha256, verify_prepared
from mtnrec.data.prepared.vocabulary import TextVocabulary, Vocabulary
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.data.raw import blocks
from mtnrec.data.raw.archives import open_zip, read_tar
from mtnrec.data.raw.bad_rows import BadRows
from mtnrec.data.raw.blocks import read_blocks
from mtnrec.data.raw.delimited import read_delimited
from mtnrec.data.raw.files import text_bytes
from mtnrec.data.raw.progress import ReadProgress
from mtnrec.data.raw.triples import Selection, describe_error, parse_lines
from mtnrec.data.table import Table
from mtnrec.model.network import build_network
from mtnrec.model.shared_bottom import SharedBottom
from mtnrec.reporting.resampling import resample_aucs
from mtnrec.run.identity import CHECKPOINTS, RunIdentity
from mtnrec.run.scores import Scores, read_scores, scores_file, write_scores
from mtnrec.schema import CategoricalField, Schema
from mtnrec.serving.encoder import Encoder, read_vocabularies
from mtnrec.tracking.loggers import make_loggers
from mtnrec.training.fit import check_settings
from mtnrec.training.module import MultiTaskModule
from mtnrec.training.resume import ResumePoint
from mtnrec.training.selection import selection_callbacks

Case = Any  # bytes, overrides, or files by name, where a string is something other than a file


@dataclass(frozen=True)
class Target:
    """One fuzz target.

    Args:
        run: Function that reads an input.
        cases: Hypothesis strategy for inputs.
        example: A valid input.
        seeds: Starting inputs of the coverage-guided search.
    """

    run: Callable[[Case], None]
    cases: st.SearchStrategy[Case]
    example: Case
    seeds: list[bytes] = field(default_factory=list)


def _damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """Cut, replace or insert a few bytes."""
    odd = [b"\0", b"\xff", b"\n", b",", b'"', b"\r", b"\xef\xbb\xbf", b"-1", b"1e999", b"9" * 25]
    put = st.one_of(st.binary(max_size=6), st.sampled_from(odd))
    edit = st.tuples(st.integers(0, len(whole)), st.integers(0, 8), put)

    def apply(edits: list[tuple[int, int, bytes]], end: int | None) -> bytes:
        changed = whole
        for at, length, new in edits:
            changed = changed[:at] + new + changed[at + length :]
        return changed[:end]

    ends = st.one_of(st.none(), st.none(), st.integers(0, len(whole)))
    return st.builds(apply, st.lists(edit, min_size=1, max_size=4), ends)


_ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2, 1.5, float("nan"), float("inf"), 10**6, 10**12, 10**18, 10**30),
    *("", "x", "../x", "/etc/passwd", "a/b", "a\0b", "\udc80", "x" * 300, [], {}, [[]], {"": {}}),
    *([1, "x", None], {"x": 1}, ["click"], [{"name": "shop", "vocabulary_size": 10**12}]),
]


@st.composite
def _changed(draw: st.DrawFn, tree: Any, odd: list[Any]) -> Any:
    """Replace, remove, rename or add a few entries of nested containers."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
                place = inner
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
            if action == "replace" or isinstance(place, list):
                place[key] = copy.deepcopy(draw(st.sampled_from(odd)))
            else:
                value = place.pop(key)
                if action == "rename":
                    place[draw(st.sampled_from(["x", "../x", "", "/x", *keys]))] = value
            break
    return tree


def _changed_json(text: bytes) -> st.SearchStrategy[bytes]:
    deep = [b"[" * 10**5, b'{"a":' * 10**5, b"[" * 10**5 + b"]" * 10**5, b"9" * 5000, b"1e400"]
    trees = _changed(json.loads(text), _ODD).map(lambda tree: json.dumps(tree).encode())
    return st.one_of(trees, trees, _damaged(text), st.sampled_from(deep))


def _files(
    whole: dict[str, bytes], other: dict[str, st.SearchStrategy[Any]] | None = None
) -> st.SearchStrategy[dict[str, Any]]:
    """Change one or two of the files, or replace them with something else."""
    kinds = st.sampled_from(["absent", "folder", "fifo", "loop", "/dev/zero", "/proc/self/mem"])
    one = {
        name: st.one_of((other or {}).get(name, _damaged(content)), _damaged(content), kinds)
        for name, content in whole.items()
    }
    pairs = st.sampled_from(sorted(one)).flatmap(lambda name: st.tuples(st.just(name), one[name]))
    return st.lists(pairs, min_size=1, max_size=2).map(dict)


def _put(folder: Path, files: dict[str, Any]) -> None:
    """Write the files or their replacements."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "loop":
            path.symlink_to(path)
        elif content != "absent":
            path.symlink_to(content)


def _read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _csv(folder: Path) -> Target:
    types = {"shop": pl.Int32, "price": pl.Float64, "click": pl.Int64}
    text = b"shop,price,click\n1,0.5,0\n-2,1e3,1\r\n3,.5,1"
    blocks.BLOCK_BYTES = 64

    def run(data: bytes) -> None:
        flags, data = data[:1], data[1:]
        flag = flags[0] if flags else 0
        bad_rows = BadRows(BadRows.CHOICES[flag // 2 % 2])
        blocks = read_blocks(io.BytesIO(data), "input.csv")
        for rows in read_delimited(blocks, types, bad_rows, has_header=flag % 2 == 0):
            assert len(rows.lines) == rows.frame.height
        bad_rows.warn()

    seeds = [bytes([flag]) + text for flag in range(4)]
    return Target(run, _damaged(seeds[0]), seeds[0], seeds)


def _triples(folder: Path) -> Target:
    selection = Selection(
        ids=["101", "205"], values=["508", "853"], bags=["109_14", "210"], first=["205"]
    )
    common = b"00000000000000aa,3,101\x027\x031.0\x01109_14\x025\x030.69315\x01109_14\x026\x03-2\n"
    skeleton = b"1,1,0,00000000000000aa,2,205\x024190001\x031.0\x01853\x029\x031.5\n2,0,0,"

    def run(data: bytes) -> None:
        is_skeleton, block = data[:1] == b"s", data[1:].rstrip(b"\n") + b"\n"
        lines = parse_lines(block, selection, skeleton=is_skeleton)
        for row in np.flatnonzero(lines.error):
            describe_error(block, lines, int(row))

    seeds = [b"c" + common, b"s" + skeleton]
    return Target(run, st.one_of(*map(_damaged, seeds)), seeds[0], seeds)


def _archive(folder: Path) -> Target:
    csv = b"1,2,3\n" * 20
    zips, tars = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zips, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/a.csv", csv)
    with tarfile.open(fileobj=tars, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x/a.csv")
        info.size = len(csv)
        info.pax_headers = {"comment": "x" * 200}
        tar.addfile(info, io.BytesIO(csv))
    meter = ReadProgress()
    path = folder / "a.tar.gz"

    def run(data: bytes) -> None:
        kind, data = data[:1], data[1:]
        if kind == b"z":
            with open_zip(io.BytesIO(data), "input.zip", ["a.csv"]) as open_member:
                for _ in read_blocks(open_member("a.csv"), "input.zip:a.csv"):
                    pass
            return
        path.write_bytes(gzip.compress(data, 1) if kind == b"t" else data)
        text_bytes(path)
        for name, stream in read_tar(path, ["a.csv"], meter):
            for _ in read_blocks(stream, name):
                pass

    tar_bytes = tars.getvalue()[:3584]
    seeds = [b"z" + zips.getvalue(), b"t" + tar_bytes, b"g" + gzip.compress(tar_bytes, mtime=0)]
    return Target(run, st.one_of(*map(_damaged, seeds)), seeds[0], seeds)


@cache
def _settings(name: str) -> dict[str, Any]:
    config = OmegaConf.to_container(_compose(f"data={name}").data, resolve=True)
    return {key: value for key, value in config.items() if key != "_target_"}


def _datamodule(kind: type[DataModule], name: str, **keys: Any) -> DataModule:
    """Build the DataModule of ``data=<name>`` with changed settings."""
    return kind(**_settings(name) | keys)


def _compose(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=["output_dir=run", *overrides])


_LOOSE = {"on_error": "skip", "fill": 0.0}
_CHOICES: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {},
        _LOOSE,
        _LOOSE | {"group": "shop", "split": "grouped", "categorical": None, "numerical": None},
        _LOOSE | {"time": "day", "split": "time", "fill": "mean", "standardise": True},
    ]
)


def _frame(rows: int = 24) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "shop": [f"s{row % 5}" for row in range(rows)],
            "price": [row / 4 for row in range(rows)],
            "day": [f"2024-01-{row % 28 + 1:02}" for row in range(rows)],
            "click": [row % 2 for row in range(rows)],
            "buy": [int(row % 4 == 3) for row in range(rows)],
        }
    )


def _prepare_table(folder: Path, name: str, data: bytes, keys: dict[str, Any]) -> None:
    shutil.rmtree(folder / "table", ignore_errors=True)
    _put(folder / "table", {name: data})
    roles = {"labels": ["click", "buy"], "categorical": ["shop"], "numerical": ["price"]}
    place = {"train": folder / "table" / name, "dir": folder / "set"}
    _datamodule(Table, "table", **place | roles | keys).prepare()


def _table(folder: Path) -> Target:
    get_console().quiet = True
    text = _frame().write_csv().encode()
    quoted = _frame().with_columns(pl.lit('a,"b\n').alias("note")).write_csv().encode()

    def run(case: tuple[str, bytes, dict[str, Any]]) -> None:
        _prepare_table(folder, *case)

    zipped = gzip.compress(text, mtime=0)
    cases = st.one_of(
        st.tuples(st.just("rows.csv"), st.one_of(_damaged(text), _damaged(quoted)), _CHOICES),
        st.tuples(st.just("rows.csv.gz"), _damaged(zipped), _CHOICES),
        st.tuples(st.just("rows.csv.gz"), _damaged(text).map(gzip.compress), _CHOICES),
    )
    return Target(run, cases, ("rows.csv", text, {}))


def _columns(rows: int) -> st.SearchStrategy[pl.Series]:
    """Draw columns of any type, including nested ones."""
    types: list[Any] = [
        *(pl.Int8, pl.Int64, pl.UInt64, pl.Float32, pl.Float64, pl.Boolean, pl.String, pl.Binary),
        *(pl.Date, pl.Datetime("ns"), pl.Time, pl.Duration, pl.Null, pl.Categorical, pl.Decimal),
        *(pl.List(pl.Int64), pl.Array(pl.Int8, 2), pl.Struct({"a": pl.Int8}), pl.List(pl.String)),
    ]

    def make(dtype: Any, null: bool, ones: bool) -> pl.Series:
        value = None if null else _value_of(dtype, ones)
        return pl.Series([value] * rows, dtype=dtype, strict=False)

    return st.builds(make, st.sampled_from(types), st.booleans(), st.booleans())


def _value_of(dtype: Any, ones: bool) -> Any:
    if dtype in (pl.Date, pl.Datetime, pl.Time, pl.Duration):
        return pl.Series([1]).cast(pl.Int32 if dtype == pl.Date else pl.Int64).cast(dtype)[0]
    if dtype.is_nested():
        return {"a": 1} if dtype == pl.Struct else [1, 2] if dtype != pl.List(pl.String) else ["a"]
    return b"a" if dtype == pl.Binary else "a" if dtype == pl.Categorical else int(ones)


def _parquet(folder: Path) -> Target:
    get_console().quiet = True

    def to_bytes(frame: pl.DataFrame) -> bytes:
        file = io.BytesIO()
        frame.write_parquet(file, compression="uncompressed")
        return file.getvalue()

    def run(case: tuple[bytes, dict[str, Any]]) -> None:
        _prepare_table(folder, "rows.parquet", *case)

    def retyped(changes: dict[str, pl.Series]) -> bytes:
        return to_bytes(_frame().with_columns(**changes))

    whole = to_bytes(_frame())
    names = st.sampled_from(_frame().columns)
    typed = st.dictionaries(names, _columns(24), min_size=1, max_size=2).map(retyped)
    return Target(run, st.tuples(st.one_of(_damaged(whole), typed), _CHOICES), (whole, {}))


def _aliexpress(folder: Path) -> Target:
    get_console().quiet = True
    rng = np.random.default_rng(0)
    header = ",".join(["search_id", *CATEGORICAL, *NUMERICAL, *LABELS])
    rows = [
        ",".join(
            map(str, [n, *rng.integers(0, 9, 16), *rng.random(63).round(3), n % 2, n % 4 // 3])
        )
        for n in range(8)
    ]
    text = ("\n".join([header, *rows]) + "\n").encode()
    whole = {"train.csv": text, "test.csv": text}

    def run(case: tuple[dict[str, Any], str]) -> None:
        place = folder / "raw"
        shutil.rmtree(place, ignore_errors=True)
        _put(place, whole | case[0])
        keys = {"raw_dir": place, "dir": folder / "set", "on_error": case[1]}
        _datamodule(AliExpress, "aliexpress_nl", **keys).prepare()

    cases = st.tuples(_files(whole), st.sampled_from(BadRows.CHOICES))
    return Target(run, cases, ({}, "refuse"))


def _kuairand(folder: Path) -> Target:
    get_console().quiet = True

    def log(month: int, first: int) -> bytes:
        head = "user_id,video_id,date,hourmin,time_ms,is_click,long_view,tab\n"
        days = range(first, first + 8)
        cells = [
            f"{d % 4},{d % 3},2022{month:02}{d:02},{d}00,{d},{d % 2},{d % 4 // 3},1" for d in days
        ]
        return (head + "\n".join(cells) + "\n").encode()

    users = ",".join(["user_id", *OF_USER]) + "\n" + f"1{',1' * len(OF_USER)}\n"
    videos = "video_id,author_id,video_type,upload_type,music_type,tag,video_duration,upload_dt\n"
    videos += '1,7,NORMAL,Web,4.0,"12,65",9233.0,2022-04-07\n'
    whole = {
        "log_standard_4_08_to_4_21_pure.csv": log(4, 10),
        "log_standard_4_22_to_5_08_pure.csv": log(5, 1),
        "log_random_4_22_to_5_08_pure.csv": log(5, 1),
        "user_features_pure.csv": users.encode(),
        "video_features_basic_pure.csv": videos.encode(),
    }

    def run(case: tuple[dict[str, Any], str]) -> None:
        place = folder / "raw"
        shutil.rmtree(place, ignore_errors=True)
        _put(place, whole | case[0])
        keys = {"raw_dir": place, "dir": folder / "set", "on_error": case[1]}
        _datamodule(KuaiRand, "kuairand", **keys).prepare()

    cases = st.tuples(_files(whole), st.sampled_from(BadRows.CHOICES))
    return Target(run, cases, ({}, "refuse"))


def _census_income(folder: Path) -> Target:
    get_console().quiet = True
    schooling, states = ("Children", "High school graduate"), ("Never married", "Widowed")
    lines = []
    for n in range(8):
        cells = [f"{n * column % 5}" for column in range(41)]
        cells[4], cells[7] = schooling[n % 2], states[n % 3 % 2]
        cells[25] = "?" if n == 0 else "MSA to MSA"
        lines.append(", ".join([*cells, ("- 50000.", "50000+.")[n % 2]]) + "\n")
    text = "".join(lines).encode()
    whole = {"census-income.data": text, "census-income.test": text}

    def run(case: tuple[dict[str, Any], str]) -> None:
        place = folder / "raw"
        shutil.rmtree(place, ignore_errors=True)
        _put(place, whole | case[0])
        keys = {"raw_dir": place, "dir": folder / "set", "on_error": case[1]}
        _datamodule(CensusIncome, "census_income", **keys).prepare()

    cases = st.tuples(_files(whole), st.sampled_from(BadRows.CHOICES))
    return Target(run, cases, ({}, "refuse"))


def _ali_ccp(folder: Path) -> Target:
    get_console().quiet = True
    source = folder / "log"
    source.mkdir()
    ali_ccp_log.write_log(source, 24, history=0.01, rows_per_common=4)
    skeleton = source / "sample_skeleton_train.csv"
    index = skeleton.read_text().split(",", 4)[3]
    with skeleton.open("a") as file:
        file.write(f"901,1,1,{index},1,205\x024190001\x031.0\n")  # both labels have both values
        file.write(f"902,1,0,{index},1,205\x024190001\x031.0\n")
    plain = {
        path.name: path.read_bytes() for path in source.iterdir() if path.name.endswith(".csv")
    }

    def packed(split: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name in (f"common_features_{split}.csv", f"sample_skeleton_{split}.csv"):
                archive.add(source / name, arcname=name)
        return file.getvalue()

    tars = {f"sample_{split}.tar.gz": packed(split) for split in ("train", "test")}

    def run(case: tuple[bool, dict[str, Any], str]) -> None:
        place = folder / "raw"
        shutil.rmtree(place, ignore_errors=True)
        _put(place, (tars if case[0] else plain) | case[1])
        keys = {"raw_dir": place, "dir": folder / "set", "on_error": case[2], "threads": 1}
        keys |= {"preset": "aitm", "min_count": 1, "tokens": "all"}
        _datamodule(AliCcp, "ali_ccp", **keys).prepare()

    choices = st.sampled_from(BadRows.CHOICES)
    cases = st.one_of(
        st.tuples(st.just(True), _files(tars), choices),
        st.tuples(st.just(False), _files(plain), choices),
    )
    return Target(run, cases, (False, {}, "refuse"))


def _write_set(folder: Path) -> Path:
    """Write a prepared set of 12 and 6 rows, with a text, an integer and a multi-valued field."""
    rng = np.random.default_rng(0)
    directory = folder / "whole"
    with write_prepared(directory, ("train", "test")) as writer:
        for split, rows in (("train", 12), ("test", 6)):
            click = np.arange(rows) % 2
            writer.append(
                split,
                {
                    "categorical": rng.integers(0, [4, 3], (rows, 2)),
                    "numerical": rng.random((rows, 2)),
                    "labels": np.stack([click, click & (np.arange(rows) % 4 > 1)], axis=1),
                    "group": rng.integers(0, 4, rows),
                    "bag": rng.integers(0, 3, (rows, 1)),
                },
            )
            writer.append_bags(
                split, "brands", np.array([0, 2, 1]), rng.integers(0, 3, 3), rng.random(3)
            )
        fields = (
            Vocabulary(np.array([3, 5, 9], np.int32)).write(writer.directory, "shop"),
            TextVocabulary(pl.Series(["a", "b"])).write(writer.directory, "age"),
        )
        brands = Vocabulary(np.array([1, 2], np.int32)).write(writer.directory, "brands")
        writer.finish(
            source="tiny",
            parameters={"seed": 0, "fields": ["shop"]},
            schema=Schema(fields, ("price", "width"), ("click", "buy"), True, (brands,)),
            report={"dropped": 3},
            transforms={"price": {"fill": 0.0, "shift": 0.5, "scale": 2.0}},
        )
    return directory


_MODEL = {
    "_target_": "mtnrec.model.shared_bottom.SharedBottom",
    **{"embedding_dim": 2, "bag_mode": "mean", "bottom_widths": [3], "tower_widths": [2]},
    **{"dropout": 0.0, "batch_norm": False},
}


def _schema(folder: Path) -> Target:
    text = (_write_set(folder) / "schema.json").read_bytes()

    def run(data: bytes) -> None:
        manifest = Manifest.from_json(data, Path("schema.json"))
        assert Manifest.from_json(manifest.to_json().encode(), Path("again")) == manifest

    return Target(run, _changed_json(text), text)


def _store(folder: Path) -> Target:
    directory = _write_set(folder)
    whole = _read_files(directory)

    def run(files: dict[str, Any]) -> None:
        place = folder / "set"
        shutil.rmtree(place, ignore_errors=True)
        _put(place, whole | files)
        manifest, arrays = open_prepared(place)
        # The checksums match the files, as in a set that an attacker writes.
        for name in manifest.checksums:
            if (place / name).is_file() and (place / name).stat().st_size < 1 << 20:
                manifest.checksums[name] = sha256(place / name)
        verify_prepared(place, manifest)
        _datamodule(Table, "table", dir=place, verify=False).setup()
        for split, found in arrays.items():
            rows = np.arange(manifest.rows[split])
            batch = RowGatherer(found, rows, manifest.schema)[rows]
            SharedBottom(manifest.schema, **_keywords())(batch)

    npys = {
        name: st.one_of(_npy(content), _damaged(content[128:]).map(content[:128].__add__))
        for name, content in whole.items()
        if name.endswith(".npy")
    }
    json_cases = {"schema.json": _changed_json(whole["schema.json"])}
    return Target(run, _files(whole, npys | json_cases), {})


def _keywords() -> dict[str, Any]:
    return {key: value for key, value in _MODEL.items() if key != "_target_"}


def _npy(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw the array with another type, order or shape, or as a pickle."""
    array = np.load(io.BytesIO(content))

    def save(changed: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, changed, allow_pickle=True)
        return file.getvalue()

    changes = [
        *(
            array.astype(dtype)
            for dtype in ("i8", ">i4", "f8", "c16", "O", "S3", "U2", "?", "M8[s]")
        ),
        *(np.asfortranarray(array), array[:-1], array[..., None], array.ravel(), array.T),
        *(array + array.dtype.type(200), np.full_like(array, 99), np.zeros(3, "i4,f4")),
        np.array([{"a": os.system}], object),
    ]
    return st.sampled_from(changes).map(save)


def _vocabulary(folder: Path) -> Target:
    directory = _write_set(folder)
    schema = open_prepared(directory)[0].schema
    names = ("shop", "age", "brands")
    whole = {name: (directory / "vocabulary" / f"{name}.parquet").read_bytes() for name in names}

    def save(value: pl.Series, index: pl.Series) -> bytes:
        file = io.BytesIO()
        pl.DataFrame({"value": value, "index": index}).write_parquet(file)
        return file.getvalue()

    def run(files: dict[str, bytes]) -> None:
        vocabularies = read_vocabularies(
            {name: io.BytesIO(data) for name, data in (whole | files).items()}
        )
        encoder = Encoder(schema, vocabularies, {})
        rows = {"shop": [3, 4], "age": ["a", "x"], "price": [0.5, 1], "width": [1, 2]}
        encoder.encode(pl.DataFrame(rows | {"brands": [[1], []]}, strict=False), str)

    odd = st.builds(save, _columns(3), _columns(3))
    order = st.permutations([1, 2, 3]).map(lambda o: save(pl.Series([9, 5, 3]), pl.Series(o)))
    cases = st.dictionaries(
        st.sampled_from(names), st.one_of(odd, order, *map(_damaged, whole.values())), min_size=1
    )
    return Target(run, cases, {})


def _scores(folder: Path) -> Target:
    rng = np.random.default_rng(0)
    score, label = rng.normal(size=24).astype(np.float32), np.arange(24) % 3 == 0
    written = Scores({"ctr": score}, {"ctr": label}, np.arange(24) // 4)
    write_scores(folder, "test", written)
    path = scores_file(folder, "test")
    whole, frame = path.read_bytes(), pl.read_parquet(path)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        resample_aucs(read_scores(folder, "test", hashlib.sha256(data).hexdigest()), 3)

    def retyped(changes: dict[str, pl.Series]) -> bytes:
        file = io.BytesIO()
        frame.with_columns(**changes).write_parquet(file)
        return file.getvalue()

    names = st.sampled_from(frame.columns)
    typed = st.dictionaries(names, _columns(24), min_size=1, max_size=2).map(retyped)
    return Target(run, st.one_of(_damaged(whole), typed), whole)


def _checkpoint(folder: Path) -> Target:
    directory = _write_set(folder)
    manifest = open_prepared(directory)[0]
    network = SharedBottom(manifest.schema, **_keywords())
    content = {
        "epoch": 1,
        "state_dict": {f"network.{name}": w for name, w in network.state_dict().items()},
        "mtnrec": model_metadata(_MODEL, manifest, directory),
    }
    path = folder / "best.ckpt"

    def save(tree: Any) -> bytes:
        file = io.BytesIO()
        torch.save(tree, file)
        return file.getvalue()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        scorer = load_checkpoint(path, device="cpu")
        rows = {"shop": [3, 4], "age": ["a", "x"], "price": [0.5, 1], "width": [1, 2]}
        scorer.score_raw(pl.DataFrame(rows | {"brands": [[1], []]}, strict=False), str, 8)

    whole = save(content)
    odd = [
        *(torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.zeros(1).expand(10**12)),
        *(torch.eye(2).to_sparse(), torch.zeros(2, 2, dtype=torch.complex64), torch.tensor(1.0)),
        *(torch.full((4, 2), float("nan")), torch.zeros(4, 2, device="meta"), b"x", (1, 2)),
        *("torch.nn.Linear", "os.system", "mtnrec.train.main", "mtnrec.model.mmoe.MMoE"),
    ]
    manifests = _changed_json(manifest.to_json().encode()).map(
        lambda text: save(_with_manifest(content, text))
    )
    trees = _changed(content, [*_ODD, *odd]).map(save)
    return Target(run, st.one_of(trees, manifests, _damaged(whole), _repacked(whole)), whole)


def _with_manifest(content: dict[str, Any], text: bytes) -> dict[str, Any]:
    card = content["mtnrec"] | {"manifest": text.decode(errors="replace")}
    return content | {"mtnrec": card}


def _repacked(whole: bytes) -> st.SearchStrategy[bytes]:
    """Draw checkpoints with a damaged pickle and correct checksums, compressed or not."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(part for part in parts if part.endswith("data.pkl"))

    def pack(pickle: bytes, compression: int) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for part, content in (parts | {name: pickle}).items():
                archive.writestr(part, content)
        return file.getvalue()

    kinds = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    return st.builds(pack, _damaged(parts[name]), kinds)


_ODD_TEXTS = [
    *("-1", "0", "1", "2", "0.5", "1e400", "nan", "-inf", "null", "true", "[]", "{}", "''", "x"),
    *("9" * 10, "9" * 30, "../x", "[1,[2]]", "[1,1]", "{a:1}", "{default:4,shop:-1}", "[-1]"),
    *("'a b'", "${seed}", "${nothing}", "${oc.env:NOTHING}", "é", "1.0e-3", "[x,y]", "all", "???"),
    *("[" * 50 + "]" * 50, "${", "'", "a=b", "val/ctr_auc", "test/ctr_auc", "\\u0000", "mean"),
]
_BUG_ERRORS = (LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError)
_GROUPS = {
    "data": ["synthetic", "synthetic_ali_ccp", "aliexpress_nl", "ali_ccp", "table", "x", "null"],
    "model": ["shared_bottom", "esmm", "mmoe", "x"],
    "optimizer": ["adam", "lazy_adam"],
    "trainer": ["default"],
    "logger": ["csv", "tensorboard"],
}


def _config_target(folder: Path) -> Target:
    schema = Schema((CategoricalField("shop", 4),), ("price",), ("click", "buy"), True)
    keys: set[str] = set()
    for group, names in _GROUPS.items():
        for name in names:
            if (CONF_DIR / group / f"{name}.yaml").is_file():
                keys |= set(_flat(_compose(f"{group}={name}")))
    usual = sorted(key for key in keys if "._" not in key)

    def run(overrides: list[str]) -> None:
        try:
            config = _compose(*overrides)
        except (CompactHydraException, ValueError) as error:  # Hydra prints it in a line or two
            raise InputError(f"Hydra: {error}") from error
        try:
            _build(config, schema)
        except Exception as error:
            known = find_input_error(error)
            if known is None or isinstance(error.__cause__, _BUG_ERRORS):
                raise
            raise known from error

    values = st.one_of(
        st.sampled_from(_ODD_TEXTS), st.sampled_from(_ODD_TEXTS), st.text(max_size=5)
    )
    key_override = st.builds(
        "{}{}={}".format, st.sampled_from(["", "", "", "+", "~"]), st.sampled_from(usual), values
    )
    groups = st.sampled_from([f"{g}={n}" for g, names in _GROUPS.items() for n in names])
    cases = st.tuples(st.lists(groups, max_size=2), st.lists(key_override, min_size=1, max_size=3))
    os.chdir(folder)
    return Target(run, cases.map(lambda case: [*case[0], *case[1]]), [])


def _build(config: Any, schema: Schema) -> None:
    """Build all parts of a training without training."""
    check_settings(config)
    for part in ("data", "noise", "mtn", "regularizer"):
        instantiate(config[part], _convert_="all")
    objective = {part: instantiate(config[part], _convert_="all") for part in ("loss", "balance")}
    model = instantiate(config.model, _partial_=True, _convert_="all")
    network = build_network(partial(model, schema=schema))
    optimizer = instantiate(optimizer_keys(config.optimizer))
    module = MultiTaskModule(network, schema=schema, optimizer=optimizer, **objective)
    module.configure_optimizers()
    labels = np.array([[0, 0], [1, 0], [1, 1]], np.uint8)
    folder = Path(config.output_dir)
    selection_callbacks(
        config.monitor,
        config.patience,
        folder,
        stop=config.stop,
        schema=schema,
        validation_labels=labels,
    )
    ResumePoint(folder, "id", config.trainer[CHECKPOINTS])
    settings = OmegaConf.to_container(config, resolve=True)
    logger = make_loggers(config.logger, RunIdentity(settings, "checksum", ["seed"]))
    instantiate(lightning_keys(config.trainer), logger=logger, enable_progress_bar=False)


def _flat(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key, value in OmegaConf.to_container(config, resolve=False).items():
        inner = isinstance(value, dict) and value
        keys += _flat(OmegaConf.create(value), f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return keys


TARGETS: dict[str, Callable[[Path], Target]] = {
    "csv": _csv,
    "triples": _triples,
    "archive": _archive,
    "table": _table,
    "parquet": _parquet,
    "aliexpress": _aliexpress,
    "ali_ccp": _ali_ccp,
    "kuairand": _kuairand,
    "census_income": _census_income,
    "schema": _schema,
    "store": _store,
    "vocabulary": _vocabulary,
    "scores": _scores,
    "checkpoint": _checkpoint,
    "config": _config_target,
}
