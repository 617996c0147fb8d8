"""Every folder and loose file of the package, and its allowed imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mtnrec

PACKAGE = Path(mtnrec.__file__).parent
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")
}
GROUND = {"arrays", "batch", "checks", "schema"}
MOST_LOOSE_FILES = 16  # eleven of them commands
# From the bottom up. A folder may import itself and these.
ALLOWED = {
    "arrays": set(),
    "checks": set(),
    "system": {"checks"},
    "schema": {"checks"},
    "batch": set(),
    "data": GROUND | {"system"},
    "metric": GROUND,
    "model": GROUND | {"system"},
    "objective": GROUND | {"model"},
    "optimizer": {"checks"},
    "mtn": {"checks", "metric", "optimizer"},
    "regularizer": {"checks", "optimizer"},
    "run": {"arrays", "checks", "system"},
    "tuning": {"checks", "system"},
    "command": {"checks", "run"},
    "inspection": GROUND | {"data", "metric"},
    "checkpoint": {"checks", "data", "system", "model", "schema"},
    "reporting": {"arrays", "checks", "system", "metric", "run", "tuning"},
    "sweep": {"checks", "command", "data", "system", "metric", "run", "tuning"},
    "serving": GROUND | {"checkpoint", "data", "system", "metric", "run"},
    "tracking": {"checks", "metric", "reporting", "run"},
    "training": GROUND
    | {"checkpoint", "command", "data", "system", "inspection", "metric", "model", "objective"}
    | {"optimizer", "mtn", "system", "regularizer", "run", "serving", "tracking"},
    # The commands.
    "train": {"checks", "command", "run", "sweep", "tracking", "training"},
    "prepare": {"command"},
    "describe": {"command", "data", "system", "inspection"},
    "predict": {"checks", "command", "system", "serving"},
    "evaluate": {"command", "system", "predict", "serving"},
    "export": {"checks", "command", "run", "serving"},
    "status": {"checks", "command", "run", "sweep"},
    "report": {"checks", "command", "reporting"},
    "compare": {"checks", "command", "reporting", "run"},
    "dashboard": {"checks", "command", "system", "tracking"},
    "__main__": {"command"},
    "__init__": {"data", "model", "mtn", "optimizer", "regularizer", "reporting", "serving"}
    | {"training"},
}


def imports(path):
    """Yield the full names that a module imports: ``torch``, ``mtnrec.schema.Schema``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_folder_and_loose_file_is_known():
    assert {name.split("/")[0] for name in MODULES} == ALLOWED.keys()
    assert len([name for name in MODULES if "/" not in name]) <= MOST_LOOSE_FILES


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    modules = [path for name, path in MODULES.items() if name.split("/")[0] == room]
    names = [name.split(".") for path in modules for name in imports(path)]
    found = {parts[1] for parts in names if parts[0] == "mtnrec"} - {room}

    assert modules
    assert found <= ALLOWED[room]
    lower = list(ALLOWED)[: list(ALLOWED).index(room)]
    assert room == "__init__" or found <= set(lower)


@pytest.mark.parametrize("model", [name for name in MODULES if name.startswith("model/")])
def test_a_network_does_not_import_lightning_metrics_or_optimisers(model):
    names = set(imports(MODULES[model]))

    strangers = ("lightning", "mtnrec.metric", "mtnrec.optimizer")
    assert not [name for name in names if name.startswith(strangers)]


def modules_loaded(*names):
    code = f"import sys, {', '.join(names)}\nprint(*{{n.partition('.')[0] for n in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


@pytest.mark.slow
def test_a_training_does_not_import_unused_libraries():
    loaded = modules_loaded("mtnrec.train", "mtnrec.data.synthetic", "mtnrec.data.aliexpress")

    assert not loaded & {"numba", "pandas", "polars", "pyarrow", "sklearn", "wandb"}


def test_runs_are_read_and_reported_without_torch_lightning_and_hydra():
    rooms = [name for name in MODULES if name.startswith(("reporting/", "run/"))]

    loaded = modules_loaded(*(f"mtnrec.{name.replace('/', '.')}" for name in rooms))

    assert "pandas" in loaded
    assert not loaded & {"torch", "lightning", "hydra", "omegaconf"}
