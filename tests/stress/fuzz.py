"""Feed unexpected input to every reader of foreign bytes, and count the outcomes.

``python tests/stress/fuzz.py --seconds 60 [--target csv store] [--seed 0]``

Each target runs in a separate process, in turn. An input passes if it is read, or refused by an
``InputError``. Any other outcome, more than 10 seconds or more than 1 GiB above the start is a
finding: its traceback and input go to a file, which ``--replay FILE`` runs again. The raw parsers
are driven by coverage (``pip install 'mtnrec[fuzz]'``), the others by hypothesis; without atheris
all targets use hypothesis.
"""

import argparse
import ast
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).parents[1]))  # for `reference`
TARGETS = (
    *("csv", "triples", "archive", "table", "parquet", "aliexpress", "ali_ccp"),
    *("kuairand", "census_income"),
    *("schema", "store", "vocabulary", "scores", "checkpoint", "config"),
)
_BY_COVERAGE = ("csv", "triples", "archive")
_SECONDS, _BYTES = 10, 1 << 30  # limits of one input
_MOST_FINDINGS = 20
_HEAD = f"{'target':<12}{'driven by':<12}{'executions':>10}{'seconds':>9}{'read':>9}{'refused':>9}"


class Watch:
    """Runs inputs of one target, counts the outcomes and writes findings.

    Args:
        target: Name of the target.
        run: Function that reads an input and raises the reader's errors.
        folder: Folder for ``counts.json``, ``current.txt`` and the findings.
    """

    def __init__(self, target: str, run: Callable[[Any], None], folder: Path) -> None:
        self._target, self._run, self._folder = target, run, folder
        self.counts = {"executions": 0, "read": 0, "refused": 0, "findings": 0}
        self._seen: set[str] = set()
        self._start = self._most = _peak_bytes()
        self._written = 0.0

    def __call__(self, case: Any) -> None:
        """Run one input."""
        from mtnrec.checks import InputError

        (self._folder / "current.txt").write_text(repr(case), encoding="utf-8")
        started = time.perf_counter()
        self.counts["executions"] += 1
        try:
            self._run(case)
            self.counts["read"] += 1
        except InputError as error:
            self.counts["refused"] += 1
            if not str(error).strip():
                self._find(case, "an empty message", "")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # polars' panics are not an Exception
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            self._find(case, where, traceback.format_exc())
        if time.perf_counter() - started > _SECONDS:
            self._find(case, "slow", "")
        if _peak_bytes() > max(self._start + _BYTES, self._most):
            self._find(case, "memory", "")
        self._most = max(self._most, _peak_bytes())
        if time.perf_counter() - self._written > 0.2:
            self.write()

    def write(self) -> None:
        """Write the counts."""
        counts = self.counts | {"grown": self._most - self._start}
        temporary = self._folder / "counts.tmp"
        temporary.write_text(json.dumps(counts))
        temporary.replace(self._folder / "counts.json")
        self._written = time.perf_counter()

    def _find(self, case: Any, what: str, trace: str) -> None:
        if what in self._seen or len(self._seen) == _MOST_FINDINGS:
            return
        self._seen.add(what)
        self.counts["findings"] += 1
        write_finding(self._folder / "findings", self._target, what, trace, repr(case))


def write_finding(folder: Path, target: str, what: str, trace: str, case: str) -> None:
    """Write the outcome and, as the last line, the input."""
    folder.mkdir(exist_ok=True)
    name = f"{target}-{len(list(folder.glob(f'{target}-*')))}.txt"
    (folder / name).write_text(f"{target}\n{what}\n{trace}\n{case}\n", encoding="utf-8")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _work(arguments: argparse.Namespace) -> None:
    """Run one target until its time is over, as the main function of its process."""
    target, folder = arguments.target[0], Path(arguments.work)
    scratch = Path(tempfile.mkdtemp(dir=folder))
    by_coverage = target in _BY_COVERAGE and find_spec("atheris") is not None
    if by_coverage:
        import atheris  # it instruments modules imported from here on

        with atheris.instrument_imports(include=["mtnrec.data", "zipfile", "tarfile"]):
            import fuzz_targets
    else:
        import fuzz_targets

    found = fuzz_targets.TARGETS[target](scratch)
    found.run(found.example)  # compiles and imports in advance
    watch = Watch(target, found.run, folder)
    if by_coverage:
        corpus = scratch / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(found.seeds):
            (corpus / str(number)).write_bytes(seed)
        options = [f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed + 1}"]
        options += [f"-timeout={_SECONDS}", "-max_len=4096", "-rss_limit_mb=8192"]
        os.chdir(scratch)
        atheris.Setup([sys.argv[0], *options, str(corpus)], watch)
        atheris.Fuzz()
    else:
        signal.signal(signal.SIGALRM, _time_is_over)
        _drive(watch, found.cases, arguments.seconds, arguments.seed)
        watch.write()


def _time_is_over(*_: object) -> NoReturn:
    raise TimeoutError(f"an input took more than {_SECONDS} seconds")


def _drive(watch: Watch, cases: Any, seconds: int, seed: int) -> None:
    """Draw inputs with hypothesis until the time is over."""
    import hypothesis

    end = time.perf_counter() + seconds

    def one(case: Any) -> None:
        if time.perf_counter() < end:
            signal.alarm(_SECONDS + 2)
            watch(case)
            signal.alarm(0)

    settings = hypothesis.settings(
        max_examples=500,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    while time.perf_counter() < end:
        drawn = settings(hypothesis.given(cases)(one))
        hypothesis.seed(seed)(drawn)()
        seed += 1_000_003


def _run_target(target: str, arguments: argparse.Namespace, findings: Path) -> dict[str, Any]:
    """Run a target in a separate process; return its counts."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "findings").symlink_to(findings.resolve())
        command = [sys.executable, __file__, "--work", place, "--target", target]
        command += ["--seconds", str(arguments.seconds), "--seed", str(arguments.seed)]
        # In plain Python the parser's branches count as coverage, and a bad index is an error.
        environment = os.environ | ({"NUMBA_DISABLE_JIT": "1"} if target == "triples" else {})
        started = time.perf_counter()
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            ended = _wait(process, folder, arguments.seconds)
        seconds = time.perf_counter() - started
        counts = {"executions": 0, "read": 0, "refused": 0, "findings": 0, "grown": 0}
        if (folder / "counts.json").is_file():
            counts = json.loads((folder / "counts.json").read_text())
        if ended != 0:
            log = (folder / "log.txt").read_text(errors="replace")[-4000:]
            current = folder / "current.txt"
            case = current.read_text(encoding="utf-8") if current.is_file() else ""
            write_finding(findings, target, f"the process ended with {ended}", log, case)
            counts["findings"] += 1
        return counts | {"seconds": seconds}


def _wait(process: subprocess.Popen[bytes], folder: Path, seconds: int) -> int | str:
    """Wait for the end; kill a process that hangs in one input."""
    deadline = time.monotonic() + seconds + 120  # imports, compilation
    while process.poll() is None:
        time.sleep(0.2)
        current = folder / "current.txt"
        stuck = current.is_file() and time.time() - current.stat().st_mtime > 4 * _SECONDS
        if stuck or time.monotonic() > deadline:
            process.kill()
            process.wait()
            return "a hang"
    return process.returncode


def _replay(path: Path) -> None:
    import fuzz_targets

    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    with tempfile.TemporaryDirectory() as scratch:
        fuzz_targets.TARGETS[lines[0]](Path(scratch)).run(ast.literal_eval(lines[-1]))


def main() -> None:
    """Print one row per target; exit with status 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--target", nargs="*", default=TARGETS, choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder")
    parser.add_argument("--replay", type=Path, help="a file of the findings folder")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay:
        _replay(arguments.replay)
        return
    if arguments.work:
        _work(arguments)
        return
    arguments.findings.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"{_HEAD}{'findings':>10}{'MiB more':>10}\n")
    total = 0
    for target in arguments.target:
        counts = _run_target(target, arguments, arguments.findings)
        total += counts["findings"]
        by = "atheris" if target in _BY_COVERAGE and find_spec("atheris") else "hypothesis"
        sys.stdout.write(
            f"{target:<12}{by:<12}{counts['executions']:>10,}{counts['seconds']:>9.0f}"
            f"{counts['read']:>9,}{counts['refused']:>9,}{counts['findings']:>10}"
            f"{counts['grown'] >> 20:>10}\n"
        )
        sys.stdout.flush()
    if total:
        sys.exit(f"{total} findings in {arguments.findings}")


if __name__ == "__main__":
    main()
