"""Record of a run, ``result.json``: settings, data and results."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mtnrec.checks import InputError
from mtnrec.run.environment import code_of_run, describe_changes, sources, versions
from mtnrec.run.identity import RunIdentity
from mtnrec.system.files import read_json, write_json

FORMAT_VERSION = 1
RECORD_FILE = "result.json"
_DEEPEST = 50
_LARGEST = 2**63  # integer of a table
_NESTED: Mapping[str, Any] = {
    "config.data": Mapping[str, Any],
    "config.data.name": str,
    "config.noise.proportion": float,
    "config.model._target_": str,
    "config.mtn.enabled": bool,
    "config.trainer": Mapping[str, Any],
    "data.name": str,
    "data.checksum": str,
    "data.parameters": Mapping[str, Any],
    **{f"data.rows.{split}": int for split in ("train", "val", "test")},
    "data.suspected_leaks": Sequence[Mapping[str, Any]],
    "noise.checksum": str | None,
    **{f"seconds.{stage}": float for stage in ("setup", "fit", "test")},
}
_IF_GIVEN: Mapping[str, Any] = {"config.mtn.lam": float, "config.mtn.refresh_every": float}
_ENTRIES: Mapping[str, Sequence[str]] = {
    "history": ("epoch", "step"),
    "counts": ("rows", "positives"),
    "calibration_curves": ("predicted", "observed", "rows"),
    "data.suspected_leaks": ("feature", "task"),
}


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """Record of a run; training writes it and everything else reads it.

    Args:
        cell: Hash of the run, :attr:`~mtnrec.run.identity.RunIdentity.id`.
        seed: Seed of the run.
        config: Resolved config.
        versions: Versions by package.
        data: Name, checksum, parameters, rows and tasks of the data set, and suspected leaks.
        noise: Settings and counts of the noise, and a checksum of the replaced rows and features
            and the flipped labels.
        mtn: Group ``mtn`` of the config.
        best_epoch: Epoch whose weights were tested, from 0.
        metrics: Values by key, for example ``test/ctr_auc``, or ``test_random/ctr_auc`` of a
            further test set; None where undefined.
        counts: ``rows`` and ``positives`` by ``split/task``.
        history: ``epoch``, ``step`` and the logged values of each epoch, by key.
        calibration_curves: ``predicted``, ``observed`` and ``rows`` per bin, by ``split/task``.
        expert_distances: Matrix ``(E, E)``; None for models without experts.
        threads: Threads of the process.
        machine: Host, operating system, processor, cores, memory and GPUs.
        commits: Git ``commit`` of the working directory and of mtnrec's checkout, and whether it
            was ``dirty``; None outside a checkout.
        sources: Hash of each module of the user's own that the config names.
        stopped: Why the training ended.
        seconds: Durations of ``setup``, ``fit`` and ``test``, 0 without a test.
        samples_per_second: Throughput of ``train`` and ``evaluate``, loading included.
        peak_memory_bytes: Peak memory of the process so far, GPU memory included.
        parameters: Numbers of parameters, of the ``embeddings`` and of the rest, ``network``; empty
            in records from before they were counted.
        added_metrics: Better direction, ``higher`` or ``lower``, of each metric that the catalogue
            lacks.
        keys_of_seed: Dotted config keys derived from the seed, including ``seed``.
        scores: SHA-256 of the file of kept scores, by test set; see :mod:`mtnrec.run.scores`.
        status: ``finished``.
        format_version: Version of the format; records before 0.2 have none and are read as 1.
    """

    cell: str
    seed: int
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    noise: Mapping[str, Any]
    best_epoch: int
    metrics: Mapping[str, float | None]
    counts: Mapping[str, Mapping[str, int]]
    history: Sequence[Mapping[str, float | None]]
    calibration_curves: Mapping[str, Mapping[str, Sequence[float | None]]]
    expert_distances: Sequence[Sequence[float]] | None
    seconds: Mapping[str, float]
    samples_per_second: Mapping[str, float]
    peak_memory_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    mtn: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    commits: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    stopped: str | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    added_metrics: Mapping[str, str] = field(default_factory=dict)
    keys_of_seed: Sequence[str] = field(default_factory=lambda: ["seed", "data.seed"])
    scores: Mapping[str, str] = field(default_factory=dict)
    status: str = "finished"
    format_version: int = FORMAT_VERSION

    @property
    def is_tested(self) -> bool:
        """Whether the run was tested; a trial of a search is not."""
        return bool(self.config.get("test", True))

    @cached_property
    def identity(self) -> RunIdentity:
        """Identity of the run, by which runs are grouped and compared."""
        return RunIdentity(self.config, self.data["checksum"], self.keys_of_seed)

    def code_changes(self, threads: int | None) -> list[str]:
        """Return the differences in versions, own sources and threads between then and now.

        Args:
            threads: Threads that a run would have now; None if unknown.
        """
        before = code_of_run(self.versions, self.sources, self.threads)
        return describe_changes(before, code_of_run(versions(), sources(self.config), threads))

    def write(self, folder: Path) -> None:
        """Write ``result.json`` atomically; NaN becomes null."""
        write_json(folder / RECORD_FILE, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read a ``result.json``.

        Raises:
            InputError: If it is missing or not valid JSON, lacks a key, has a value of another
                type, or has a different format version.
        """
        content = read_json(path)
        if content is None:
            raise InputError(f"{path} is missing. Run again.")
        return cls.from_content(content, path)

    @classmethod
    def from_content(cls, content: Any, path: Path) -> "RunRecord":
        """Return the record with the parsed content of ``path``; see :meth:`read`."""
        known = {f.name: f for f in fields(cls)}
        required = [name for name, f in known.items() if _is_required(f)]
        for key in (*required, *_NESTED):
            if not _has(content, key):
                raise _lacks(path, key)
        version = content.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version}, this version of mtnrec reads "
                f"{FORMAT_VERSION}. Read it with the version that wrote it, or run again."
            )
        _check_types(path, content)
        for key, names in _ENTRIES.items():
            _check_entries(path, key, _find(content, key), names)
        record = cls(**{name: value for name, value in content.items() if name in known})
        try:
            _ = record.identity.arm, record.identity.baseline, record.identity.tags
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _is_odd(path, f"its config has another shape, {error!r}"[:200]) from None
        return record


def _check_types(path: Path, content: Mapping[str, Any]) -> None:
    key = ""
    try:
        _check_plain(content)
        for key, shape in _shapes().items():
            if _has(content, key):
                shape.validate_python(_find(content, key), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, (key, *found["loc"])))
        raise _is_odd(path, f"{place[:200]}: {found['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _is_odd(path, str(error)[:200]) from None
    distances = content["expert_distances"] or []
    if any(len(row) != len(distances) for row in distances):
        raise _is_odd(path, "expert_distances is not a square")


@cache
def _shapes() -> dict[str, TypeAdapter[Any]]:
    """Return the types of the entries by dotted key."""
    types = {**get_type_hints(RunRecord), **_NESTED, **_IF_GIVEN}
    return {key: TypeAdapter(type_) for key, type_ in types.items()}


def _check_plain(value: Any, depth: int = 0) -> None:
    """Refuse what no table or page can hold.

    Raises:
        ValueError: If a number is not finite or beyond 64 bits, a text is not Unicode, or values
            are nested too deeply.
    """
    if depth > _DEEPEST:
        raise ValueError("its values are nested too deeply")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            _check_plain(item, depth + 1)
    elif isinstance(value, str):
        value.encode()
    elif isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError("an integer has more than 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")


def _check_entries(path: Path, key: str, entries: Any, names: Sequence[str]) -> None:
    for entry in entries.values() if isinstance(entries, Mapping) else entries:
        for name in names:
            if name not in entry:
                raise _lacks(path, f"{key}.{name}")
        columns = [entry[name] for name in names if isinstance(entry[name], Sequence)]
        if len({len(column) for column in columns if not isinstance(column, str)}) > 1:
            raise _is_odd(path, f"the lists of {key} differ in length")


def warn_of_changes(finished: Iterable[tuple[RunRecord, int | None]]) -> None:
    """Warn of finished runs that are kept although their code or threads are not those of now.

    Args:
        finished: Records, each with the threads that the run would have now; None if unknown.
    """
    changes = Counter(", ".join(record.code_changes(threads)) for record, threads in finished)
    del changes[""]
    for change, runs in changes.items():
        _logger.warning(
            "%d finished run%s kept, made by other code (%s): results may differ now. Set "
            "resume=false to train again, or choose another folder",
            runs,
            " is" if runs == 1 else "s are",
            change,
        )


def warn_without_scores(finished: Iterable[RunRecord]) -> None:
    """Warn of finished runs that were tested without the scores that are asked for."""
    runs = sum(record.is_tested and not record.scores for record in finished)
    if runs:
        _logger.warning(
            "%d finished run%s kept without scores, made without keep_scores=true. Set "
            "resume=false to train again",
            runs,
            " is" if runs == 1 else "s are",
        )


def _is_required(found: Any) -> bool:
    return found.default is MISSING and found.default_factory is MISSING


def _has(content: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True


def _find(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def _is_odd(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path} is not the record of a run of mtnrec ({reason}). Delete it and run again."
    )


def _lacks(path: Path, key: str) -> InputError:
    return InputError(
        f"{path} lacks the key {key}, so this version of mtnrec did not write it. Run again."
    )
