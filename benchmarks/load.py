"""Measure opening, set-up and streaming of a large prepared set.

``python benchmarks/load.py [--rows 10000000] [--dir DIR] [--keep] [--limit MIB]``

writes a set with AliExpress's columns (322 bytes per row) of cheap random numbers, and deletes it
at the end. Each part is measured in a separate process:

* everything before the first step, with and without the files in the page cache;
* batches of 2,048 random rows: with the files in the page cache, and with at most ``--limit`` MiB
  of them in memory (default: a third of the set). This needs no control group: the process pages
  out its maps whenever more is resident, and passes the limit to the DataModule. *Plain* is without
  the DataModule's measures for such a set (reading threads, pages without their neighbours).

To exceed the memory for real, choose ``--rows`` larger than the machine's memory, or run in a
control group: ``systemd-run --scope -p MemoryMax=1G python benchmarks/load.py --dir DIR --keep
--limit 0``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

from mtnrec.data import datamodule as datamodule_module
from mtnrec.data.aliexpress import AliExpress
from mtnrec.data.datamodule import DataModule
from mtnrec.data.prepared.store import open_prepared
from mtnrec.data.prepared.verify import verify_once, verify_prepared
from mtnrec.data.prepared.writer import write_prepared
from mtnrec.inspection.leaks import check_leaks
from mtnrec.schema import CategoricalField, Schema
from mtnrec.system.resources import memory_bytes

_SIZES = (1, 4, 7, 2, 21, 7, 50, 8, 7, 2, 2, 2, 2, 2, 2, 2)
_NUMERICAL = 63
_BYTES_PER_ROW = 4 * len(_SIZES) + 4 * _NUMERICAL + 2
_ROWS_PER_CHUNK = 1 << 16
_BATCHES = {"cached": 2000, "limited": 200, "limited, plain": 60}
_PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4, which the mmap module lacks
_MIB = 1 << 20


def _make(folder: Path, rows: int) -> None:
    fields = tuple(CategoricalField(f"categorical_{i}", size + 1) for i, size in enumerate(_SIZES))
    numerical = tuple(f"numerical_{i}" for i in range(_NUMERICAL))
    schema = Schema(fields, numerical, ("click", "conversion"), funnel=True)
    rng = np.random.default_rng(0)
    with write_prepared(folder, ("train", "test")) as writer:
        for split, total in (("train", rows), ("test", max(1, rows // 100))):
            for start in range(0, total, _ROWS_PER_CHUNK):
                count = min(_ROWS_PER_CHUNK, total - start)
                sizes = [size + 1 for size in _SIZES]
                click, conversion = rng.random((2, count), dtype=np.float32) < [[0.05], [0.1]]
                arrays = {
                    "categorical": rng.integers(0, sizes, (count, len(sizes)), dtype=np.int32),
                    "numerical": rng.random((count, _NUMERICAL), dtype=np.float32),
                    "labels": np.stack([click, click & conversion], axis=1),
                }
                writer.append(split, arrays)
        writer.finish(source="load", parameters={}, schema=schema, report={})


def _datamodule(folder: Path) -> DataModule:
    return AliExpress(
        name="load",
        dir=folder,
        batch_size=2048,
        validation_share=0.2,
        validation_split="random",
        split_seed=0,
        seed=0,
        verify=False,
        country="nl",
        raw_dir=None,
        conversion_without_click="refuse",
        on_error="refuse",
    )


def _status(name: str) -> int:
    """Return a size from ``/proc/self/status`` in bytes, for example ``RssAnon`` or ``RssFile``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = perf_counter()
    result = call()
    return perf_counter() - started, result


def _start(folder: Path) -> dict[str, float]:
    """Return the seconds and memory of everything before the first step."""
    found = {}
    found["open_prepared, s"], _ = _timed(lambda: open_prepared(folder))
    datamodule, before = _datamodule(folder), _status("RssAnon")
    found["setup, s"], _ = _timed(datamodule.setup)
    held = _status("RssAnon") - before
    batches = iter(datamodule.train_dataloader())
    found["row order of an epoch and first batch, s"], _ = _timed(lambda: next(batches))
    found["private memory of setup, MiB"] = held / _MIB
    found["private memory with an epoch's order, MiB"] = (_status("RssAnon") - before) / _MIB
    found["labels of the validation rows, s"], _ = _timed(
        lambda: datamodule.column("val", "labels")
    )
    found["leak check, s"], _ = _timed(
        lambda: check_leaks(*datamodule.stored("train"), datamodule.schema)
    )
    return found


def _verify(folder: Path) -> dict[str, float]:
    """Return the time and speed of ``verify=true``, the first time and with unchanged files."""
    manifest, _ = open_prepared(folder)
    size = sum((folder / name).stat().st_size for name in manifest.checksums)
    seconds, _ = _timed(lambda: verify_prepared(folder, manifest))
    sleep(2)  # younger files are verified again
    verify_once(folder, manifest)
    again, _ = _timed(lambda: verify_once(folder, manifest))
    return {
        "verify=true, s": seconds,
        "verify=true, GB per second": size / seconds / 1e9,
        "verify=true the next time, s": again,
    }


def _stream(folder: Path, mode: str, limit: int) -> dict[str, float]:
    """Return batches per second, MiB read from disk per batch, and private memory."""
    if "plain" in mode:
        datamodule_module.memory_bytes = lambda: sys.maxsize
    elif mode == "limited" and limit:
        datamodule_module.memory_bytes = lambda: limit
    datamodule = _datamodule(folder)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    arrays = loader.dataset._arrays.values()
    batches = chain.from_iterable(repeat(loader))
    for _ in range(_BATCHES[mode] if mode == "cached" else 1):
        next(batches)
    if mode != "cached" and limit:
        _page_out(folder, arrays)
    others = _status("RssFile")
    read, started = _read_bytes(), perf_counter()
    for _ in range(_BATCHES[mode]):
        next(batches)
        if mode != "cached" and limit and _status("RssFile") - others > limit:
            _page_out(folder, arrays)
    seconds, count = perf_counter() - started, _BATCHES[mode]
    return {
        "batches per second": count / seconds,
        "ms": 1e3 * seconds / count,
        "MiB read": (_read_bytes() - read) / count / _MIB,
        "MiB private": _status("RssAnon") / _MIB,
    }


def _page_out(folder: Path, arrays: Any) -> None:
    for array in arrays:
        array.base.base.madvise(_PAGE_OUT)
    _forget(folder)


def _forget(folder: Path) -> None:
    """Evict the files from the page cache, except pages that a process has mapped."""
    for path in folder.rglob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _report(folder: Path, limit: int) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*.npy"))
    limit = size // 3 if limit < 0 else limit
    print(f"The set has {size / 1e9:.1f} GB; this process may use {memory_bytes() / 1e9:.1f} GB.\n")
    place = ("--dir", str(folder), "--limit", str(limit))
    cold: dict[str, float] = {}
    cached: dict[str, float] = {}
    for part in ("start", "verify"):
        _forget(folder)
        cold |= _run("--part", part, *place)
        if part == "start":
            _run("--part", "verify", *place)  # reads every file
        cached |= _run("--part", part, *place)
    print("| | in the page cache | on the disk |\n|---|---|---|")
    for name, value in cached.items():
        print(f"| {name} | {value:.4g} | {cold[name]:.4g} |")
    held = f"{limit / _MIB:.0f} MiB of the files" if limit else "what the system holds"
    print(f"\nBatches of 2,048 random rows; limited: to {held}\n")
    print("| | batches per second | ms | MiB read per batch | MiB of private memory |")
    print("|---|---|---|---|---|")
    for mode in _BATCHES if limit else list(_BATCHES)[1:]:
        found = _run("--part", mode, *place)
        print(f"| {mode} |", *(f"{value:.4g} |" for value in found.values()))


def main() -> None:
    """Print a table of the start and a table of the batches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dir", type=Path, help="folder of the set: a new one, or one from --keep")
    parser.add_argument("--keep", action="store_true", help="do not delete the set")
    parser.add_argument("--limit", type=int, default=-1, metavar="MIB", help="0: no own limit")
    parts = ["start", "verify", *_BATCHES]
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measures = {"start": _start, "verify": _verify}
        stream = partial(_stream, mode=arguments.part, limit=arguments.limit)
        print(json.dumps(measures.get(arguments.part, stream)(arguments.dir)))
        return
    folder = arguments.dir or Path(tempfile.mkdtemp(prefix="load-"))
    if not (folder / "schema.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed, free = arguments.rows * _BYTES_PER_ROW, shutil.disk_usage(folder.parent).free
        if needed > 0.9 * free:
            sys.exit(f"{folder} needs {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.")
        _make(folder, arguments.rows)
    try:
        _report(folder, arguments.limit * _MIB if arguments.limit >= 0 else -1)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
            folder.with_name(f".{folder.name}.verified").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
