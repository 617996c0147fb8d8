"""Code and machine of a run: versions, its own sources, commits, hardware."""

import hashlib
import os
import platform
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mtnrec.system.resources import available_cores, memory_bytes

_PACKAGES = ("mtnrec", "torch", "lightning", "torchmetrics", "numpy", "hydra-core")
_COMPARED = ("mtnrec", "torch")
_PACKAGE = Path(__file__).resolve().parents[1]
_GIT_SECONDS = 20  # longest wait for git on a slow file system


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            found[package] = "not installed"
    return found


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of the source of each module of the user's own that a config names.

    The own modules are those of the ``_target_`` keys that are not installed. Of a package all its
    files count, since the named class may use any of them.
    """
    roots = {target.partition(".")[0] for target in _targets(config)} - {"mtnrec"}
    files = {root: _own_files(root) for root in sorted(roots)}
    return {root: _hash_files(paths) for root, paths in files.items() if paths}


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_" and isinstance(item, str):
                yield item
            else:
                yield from _targets(item)
    elif isinstance(value, list):
        for item in value:
            yield from _targets(item)


def _own_files(root: str) -> list[Path]:
    try:
        spec = find_spec(root)
    except (ImportError, ValueError):  # __main__ has no spec
        origin = getattr(sys.modules.get(root), "__file__", None)
        return [] if origin is None else [Path(origin)]
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        folders = [Path(f) for f in spec.submodule_search_locations if not _is_installed(Path(f))]
        paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    else:
        paths = [Path(spec.origin)] if spec.origin and Path(spec.origin).is_file() else []
    return [path for path in paths if not _is_installed(path)]


def _is_installed(path: Path) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in _installation_folders())


@cache
def _installation_folders() -> frozenset[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return frozenset(Path(sysconfig.get_path(name)).resolve() for name in names)


def _hash_files(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def code_of_run(
    packages: Mapping[str, str], own: Mapping[str, str], threads: int | None
) -> dict[str, Any]:
    """Return what may change a result besides settings and data, by name.

    Args:
        packages: Versions by package.
        own: Hashes of :func:`sources`.
        threads: Threads of the process; None if unknown.
    """
    found = {package: packages.get(package) for package in _COMPARED}
    return {**found, "threads": threads, **{f"source of {name}": own[name] for name in own}}


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two results of :func:`code_of_run`, except to unknown values.

    >>> describe_changes({"torch": "2.7", "threads": 1}, {"torch": "2.8", "threads": None})
    ['torch was 2.7 and is 2.8']
    """
    return [
        f"{name} has changed"
        if name.startswith("source")
        else f"{name} was {old} and is {now[name]}"
        for name, old in before.items()
        if None not in (old, now.get(name)) and old != now[name]
    ]


def describe_machine() -> dict[str, Any]:
    """Return host, operating system, processor, cores and memory."""
    return {
        "host": socket.gethostname(),
        "os": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": memory_bytes(),
    }


@cache
def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def find_commits() -> dict[str, Any]:
    """Return the commits of the working directory and of mtnrec's checkout, or None outside one.

    Each is the ``commit`` and whether it is ``dirty``: whether tracked files were changed since.
    """
    checkout = _PACKAGE.parents[1]
    is_checkout = (checkout / "pyproject.toml").is_file() and _PACKAGE.parent.name == "src"
    folders = {"working_directory": _find_checkout(Path.cwd())}
    folders |= {"mtnrec": _find_checkout(checkout)} if is_checkout else {}
    commits = {folder: _commit(folder) for folder in {*folders.values()}}
    return {"mtnrec": None} | {name: commits[folder] for name, folder in folders.items()}


def _find_checkout(folder: Path) -> Path:
    """Return the root of the checkout that a folder is in; a folder outside one as it is."""
    folder = folder.resolve()
    roots = (parent for parent in (folder, *folder.parents) if (parent / ".git").exists())
    return next(roots, folder)


def _commit(folder: Path) -> dict[str, Any] | None:
    # An index lock would disturb the user's own git, and fsmonitor runs a program of the folder.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder)]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):  # no git, not a checkout, no commit
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}
