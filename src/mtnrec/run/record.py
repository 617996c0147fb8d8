"""Record of a run, ``result.json``: settings, data and results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mtnrec.checks import InputError
from mtnrec.files import write_json
from mtnrec.run.identity import RunIdentity

FORMAT_VERSION = 1
RECORD_FILE = "result.json"
_NESTED = (
    *("config.data", "config.noise.proportion", "config.model._target_", "config.mtn.enabled"),
    *("data.name", "data.checksum", "data.parameters", "noise.checksum"),
)


@dataclass(frozen=True)
class RunRecord:
    """Record of a run; training writes it and everything else reads it.

    Args:
        cell: Hash of the run, :attr:`~mtnrec.run.identity.RunIdentity.id`.
        seed: Seed of the run.
        config: Resolved config.
        versions: Versions by package.
        data: Name, checksum, parameters and rows of the data set, and suspected leaks.
        noise: Settings and counts of the noise, and a checksum of the replaced rows and features.
        mtn: Group ``mtn`` of the config.
        best_epoch: Epoch whose weights were tested, from 0.
        metrics: Values by key, for example ``test/ctr_auc``; None where undefined.
        counts: ``rows`` and ``positives`` by ``split/task``.
        history: ``epoch``, ``step`` and the logged values of each epoch, by key.
        calibration_curves: ``predicted``, ``observed`` and ``rows`` per bin, by ``split/task``.
        expert_distances: Matrix ``(E, E)``; None for models without experts.
        threads: Threads of the process.
        seconds: Durations of ``setup``, ``fit`` and ``test``.
        samples_per_second: Throughput of ``train`` and ``evaluate``, loading included.
        peak_memory_bytes: Peak memory of the process so far, GPU memory included.
        keys_of_seed: Dotted config keys derived from the seed, including ``seed``.
        status: ``finished``.
        format_version: Version of the format; records before 0.2 have none and are read as 1.
    """

    cell: str
    seed: int
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    noise: Mapping[str, Any]
    best_epoch: int
    metrics: Mapping[str, Any]
    counts: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    calibration_curves: Mapping[str, Mapping[str, Sequence[Any]]]
    expert_distances: Sequence[Sequence[float]] | None
    seconds: Mapping[str, float]
    samples_per_second: Mapping[str, float]
    peak_memory_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    mtn: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    keys_of_seed: Sequence[str] = field(default_factory=lambda: ["seed", "data.seed"])
    status: str = "finished"
    format_version: int = FORMAT_VERSION

    @cached_property
    def identity(self) -> RunIdentity:
        """Identity of the run, by which runs are grouped and compared."""
        return RunIdentity(self.config, self.data["checksum"], self.keys_of_seed)

    def write(self, folder: Path) -> None:
        """Write ``result.json`` atomically; NaN becomes null."""
        write_json(folder / RECORD_FILE, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read a ``result.json``.

        Raises:
            InputError: If it is not valid JSON, lacks a key, or has a different format version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # of JSON, encoding or nesting
            raise InputError(
                f"{path} is not valid JSON ({error}). Delete it and run again."
            ) from None
        return cls.from_content(content, path)

    @classmethod
    def from_content(cls, content: Any, path: Path) -> "RunRecord":
        """Return the record with the parsed content of ``path``."""
        known = {f.name: f for f in fields(cls)}
        required = [name for name, f in known.items() if _is_required(f)]
        for key in (*required, *_NESTED):
            if not _has(content, key.split(".")):
                raise _lacks(path, key)
        version = content.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version}, this version of mtnrec reads "
                f"{FORMAT_VERSION}. Read it with the version that wrote it, or run again."
            )
        for entry in content["history"]:
            for key in ("epoch", "step"):
                if key not in entry:
                    raise _lacks(path, f"history.{key}")
        return cls(**{name: value for name, value in content.items() if name in known})


def _is_required(found: Any) -> bool:
    return found.default is MISSING and found.default_factory is MISSING


def _has(content: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            return False
        content = content[key]
    return True


def _lacks(path: Path, key: str) -> InputError:
    return InputError(
        f"{path} lacks the key {key}, so this version of mtnrec did not write it. Run again."
    )
