"""Measure the preparation of Ali-CCP: rows and bytes per second, and peak memory.

``python benchmarks/prepare.py DIR [DIR ...] [--script DIR]``

Each DIR is a log written by ``ali_ccp_log.py``. Each measurement runs in a separate process: the
time includes its start, and the memory is its largest resident set. The script runs on one of the
logs.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mtnrec.data.prepared.store import open_prepared

SCRIPT = Path(__file__).parents[1] / "tests" / "reference" / "line_by_line.py"


def run(*command: str) -> tuple[float, int]:
    """Run a command; return its seconds and peak resident bytes."""
    started = time.perf_counter()
    process = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)]
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def scan(folder: Path) -> tuple[float, int]:
    """Read every byte once and count line ends; return the seconds and the bytes."""
    started, size = time.perf_counter(), 0
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 23):
                np.count_nonzero(np.frombuffer(block, np.uint8) == 10)
                size += len(block)
    return time.perf_counter() - started, size


def main() -> None:
    """Print one row per log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--script", type=Path, help="also run the line-by-line script on this log")
    parser.add_argument(
        "--keys", nargs="*", default=[], help="overrides, for example data.preset=rechub"
    )
    arguments = parser.parse_args()
    out = Path(tempfile.mkdtemp(dir=arguments.folders[0].parent))
    print(
        f"{'rows':>12} {'seconds':>8} {'rows/s':>10} {'MB/s':>7} {'scan MB/s':>9} {'peak MiB':>8}"
    )
    speeds = {}
    try:
        for folder in arguments.folders:
            scan(folder)  # warms the page cache for both, if the files fit
            scan_seconds, size = scan(folder)
            keys = [f"data.raw_dir={folder}", f"data.dir={out / folder.name}", *arguments.keys]
            seconds, peak = run(sys.executable, "-m", "mtnrec.prepare", "data=ali_ccp", *keys)
            manifest, _ = open_prepared(out / folder.name)
            rows = sum(manifest.rows.values())
            speeds[folder] = rows / seconds
            print(
                f"{rows:12,} {seconds:8.1f} {rows / seconds:10,.0f} {size / seconds / 1e6:7.0f} "
                f"{size / scan_seconds / 1e6:9.0f} {peak / 2**20:8.0f}"
            )
        if arguments.script:
            seconds, peak = run(
                sys.executable, str(SCRIPT), str(arguments.script), str(out / "script")
            )
            rows = sum(open_prepared(out / arguments.script.name)[0].rows.values())
            print(f"line by line: {rows / seconds:,.0f} rows/s, peak {peak / 2**20:.0f} MiB")
            ratio = speeds[arguments.script] * seconds / rows
            print(f"mtnrec on the same log: {ratio:.1f} times as fast")
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
