"""Write a log with the byte layout of Ali-CCP at any scale.

``python tests/reference/ali_ccp_log.py DIR --rows 1000000``

Fields, shares, blocks of feature ids, values and the grouping of rows match the real files: scalars
are present at their shares, histories hold ln(1 + count) with at most 5 decimals, the groups of
triples by field come in any order and a multi-valued field may be split over two groups, common
rows are sorted by index, and about 58 consecutive skeleton rows share one. Half of the rows are
training rows.
"""

import argparse
import gzip
import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

NEXT, ID, VALUE = "\x01", "\x02", "\x03"


@dataclass(frozen=True)
class Field:
    """A field: its block of ids, the share of rows with it, and its tokens in such a row."""

    name: str
    first: int
    ids: int
    present: float
    tokens: float = 1
    logarithmic: bool = False


USER = Field("101", 1, 445_000, 0.998)
# All present or all absent.
PROFILE = tuple(
    Field(name, first, ids, 0.87)
    for name, first, ids in (
        ("121", 3438658, 97),
        ("122", 3438755, 13),
        ("124", 3438768, 2),
        ("125", 3438770, 7),
        ("127", 3438780, 3),
        ("128", 3864885, 2),
    )
)
OTHERS = (Field("126", 3438777, 3, 0.416), Field("129", 3864887, 4, 0.637))
HISTORIES = (
    Field("109_14", 445_001, 6_100, 0.990, 69, logarithmic=True),
    Field("110_14", 460_000, 600_000, 0.990, 250, logarithmic=True),
    Field("127_14", 3_440_000, 200_000, 0.990, 154, logarithmic=True),
    Field("150_14", 3_866_000, 95_000, 0.998, 136, logarithmic=True),
)
ITEM = (
    Field("205", 4_190_000, 2_350_000, 1),
    Field("206", 8_316_000, 8_600, 1),
    Field("207", 8_700_000, 300_000, 1),
    Field("216", 9_150_000, 100_000, 0.711),
    Field("301", 9_351_665, 3, 1),
    Field("508", 9_351_700, 7_700, 0.697, logarithmic=True),
    Field("509", 9_500_000, 200_000, 0.221, logarithmic=True),
    Field("702", 9_360_000, 143_000, 0.224, logarithmic=True),
)
INTENTIONS = (
    Field("210", 9_030_000, 80_000, 1, 6.1),
    Field("853", 9_110_000, 40_000, 0.41, 1.4, logarithmic=True),
)
CLICK_RATE, CONVERSION_RATE, ORPHAN_RATE = 0.0389, 0.0055, 5e-6
ROWS_PER_COMMON = 58
_COMMONS_PER_CHUNK = 256


def draw_ids(rng: np.random.Generator, field: Field, count: int) -> list[int]:
    """Draw ids from a field's block, small ones more often."""
    return (field.first + (field.ids * rng.random(count) ** 3).astype(np.int64)).tolist()


def draw_values(rng: np.random.Generator, field: Field, count: int) -> list[str]:
    """Draw values as text: ln(1 + n), or 1.0."""
    if not field.logarithmic:
        return ["1.0"] * count
    return [_LOGARITHMS[n] for n in rng.geometric(0.2, count).clip(max=99).tolist()]


_LOGARITHMS = [str(round(math.log1p(n), 5)) for n in range(100)]


def triples(rng: np.random.Generator, field: Field, count: int) -> list[str]:
    """Draw ``count`` triples of a field."""
    ids, values = draw_ids(rng, field, count), draw_values(rng, field, count)
    name = field.name
    return [f"{name}{ID}{i}{VALUE}{v}" for i, v in zip(ids, values, strict=True)]


def shuffled(rng: np.random.Generator, runs: Sequence[list[str]]) -> list[str]:
    """Shuffle the groups, and split the longest in two if it is long enough."""
    order = rng.permutation(len(runs)).tolist()
    longest = max(order, key=lambda run: len(runs[run]))
    tail: list[str] = []
    out: list[str] = []
    for run in order:
        items = runs[run]
        if run == longest and len(items) > 3:
            items, tail = items[:-2], items[-2:]
        out += items
    return out + tail


def lengths(rng: np.random.Generator, field: Field, rows: int, scale: float) -> list[int]:
    """Draw the number of tokens per row for a multi-valued field."""
    present = rng.random(rows) < field.present
    mean = max(1.0, field.tokens * scale / field.present)
    return (present * (1 + rng.poisson(mean - 1, rows))).tolist()


def common_lines(rng: np.random.Generator, indices: Sequence[str], history: float) -> Iterator[str]:
    """Yield a line of common features for each index."""
    rows = len(indices)
    counts = [lengths(rng, field, rows, history) for field in HISTORIES]
    pools = [triples(rng, field, sum(c)) for field, c in zip(HISTORIES, counts, strict=True)]
    profiles = [triples(rng, field, rows) for field in PROFILE]
    others = [triples(rng, field, rows) for field in OTHERS]
    users = triples(rng, USER, rows)
    has_user, has_profile = (rng.random(rows) < f.present for f in (USER, PROFILE[0]))
    has_others = [rng.random(rows) < field.present for field in OTHERS]
    at = [0] * len(HISTORIES)
    for row, index in enumerate(indices):
        runs = []
        if has_user[row]:
            runs.append([users[row]])
        if has_profile[row]:
            runs += [[profile[row]] for profile in profiles]
        runs += [[other[row]] for other, has in zip(others, has_others, strict=True) if has[row]]
        for field, count in enumerate(counts):
            if count[row]:
                runs.append(pools[field][at[field] : at[field] + count[row]])
                at[field] += count[row]
        items = shuffled(rng, runs or [[]])
        yield f"{index},{len(items)},{NEXT.join(items)}\n"


def skeleton_lines(rng: np.random.Generator, first: int, indices: Sequence[str]) -> Iterator[str]:
    """Yield a skeleton line for each index, numbered from ``first``."""
    rows = len(indices)
    click = rng.random(rows) < CLICK_RATE
    conversion = np.where(click, rng.random(rows) < CONVERSION_RATE, rng.random(rows) < ORPHAN_RATE)
    scalars = [triples(rng, field, rows) for field in ITEM]
    has = [(rng.random(rows) < field.present).tolist() for field in ITEM]
    counts = [lengths(rng, field, rows, 1) for field in INTENTIONS]
    pools = [triples(rng, field, sum(c)) for field, c in zip(INTENTIONS, counts, strict=True)]
    at = [0] * len(INTENTIONS)
    for row, index in enumerate(indices):
        runs = [[s[row]] for s, present in zip(scalars, has, strict=True) if present[row]]
        for field, count in enumerate(counts):
            if count[row]:
                runs.append(pools[field][at[field] : at[field] + count[row]])
                at[field] += count[row]
        items = shuffled(rng, runs)
        labels = f"{click[row]:d},{conversion[row]:d}"
        yield f"{first + row},{labels},{index},{len(items)},{NEXT.join(items)}\n"


def _chunk(
    chunk: int, *, split: int, seed: int, commons: int, rows: int, history: float
) -> tuple[bytes, bytes]:
    rng = np.random.default_rng([seed, split, chunk])
    low, high = chunk * _COMMONS_PER_CHUNK, min((chunk + 1) * _COMMONS_PER_CHUNK, commons)
    # Sorted, like the chunks, and spread over the range of 64 bits.
    steps = np.arange(low, high, dtype=np.uint64) * np.uint64(2**64 // (commons + 1))
    indices = [f"{index:016x}" for index in (steps + np.uint64(rng.integers(1 << 20))).tolist()]
    common = "".join(common_lines(rng, indices, history))
    first, last = (rows * place // commons for place in (low, high))
    positions = np.sort(rng.integers(0, max(1, high - low), last - first)).tolist()
    skeleton = "".join(skeleton_lines(rng, first + 1, [indices[place] for place in positions]))
    return skeleton.encode(), common.encode()


def write_log(
    folder: Path,
    rows: int,
    *,
    seed: int = 0,
    history: float = 1.0,
    rows_per_common: int = ROWS_PER_COMMON,
    processes: int | None = None,
) -> None:
    """Write the four files; ``history`` scales the length of the histories."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in enumerate(("train", "test")):
        split_rows = rows // 2 if split else rows - rows // 2
        commons = max(1, split_rows // rows_per_common)
        make = partial(
            _chunk, split=split, seed=seed, commons=commons, rows=split_rows, history=history
        )
        chunks = range(-(-commons // _COMMONS_PER_CHUNK))
        with (
            (folder / f"sample_skeleton_{name}.csv").open("wb") as skeleton,
            (folder / f"common_features_{name}.csv").open("wb") as common,
        ):
            if len(chunks) == 1:
                parts: Iterator[tuple[bytes, bytes]] = map(make, chunks)
                for lines, features in parts:
                    skeleton.write(lines)
                    common.write(features)
                continue
            with ProcessPoolExecutor(processes) as pool:
                for lines, features in pool.map(make, chunks, chunksize=4):
                    skeleton.write(lines)
                    common.write(features)


def pack(folder: Path, archive_folder: Path, *, common_first: bool = False) -> None:
    """Put the four files into ``sample_train.tar.gz`` and ``sample_test.tar.gz``."""
    archive_folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        members = [f"sample_skeleton_{split}.csv", f"common_features_{split}.csv"]
        path = archive_folder / f"sample_{split}.tar.gz"
        with (
            gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) as plain,
            tarfile.open(fileobj=io.BufferedWriter(plain), mode="w|") as archive,
        ):
            for name in members[::-1] if common_first else members:
                info = tarfile.TarInfo(name)
                info.size = (folder / name).stat().st_size
                with (folder / name).open("rb") as file:
                    archive.addfile(info, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--archives", action="store_true", help="pack into .tar.gz and delete the csv"
    )
    arguments = parser.parse_args()
    write_log(arguments.folder, arguments.rows, seed=arguments.seed)
    if arguments.archives:
        pack(arguments.folder, arguments.folder)
        for pattern in ("sample_skeleton_*.csv", "common_features_*.csv"):
            for path in arguments.folder.glob(pattern):
                path.unlink()
