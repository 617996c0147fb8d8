import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mtnrec

PACKAGE = Path(mtnrec.__file__).parent
SHARED = {"schema", "batch", "checks"}
ALLOWED = {
    "schema": SHARED,
    "batch": SHARED,
    "checks": SHARED,
    "data": SHARED | {"data"},
    "metric": SHARED | {"metric"},
    "model": SHARED | {"model", "metric", "optimizer"},
    "optimizer": SHARED | {"optimizer"},
    "mtn": SHARED | {"mtn"},
    "reporting": {"cell", "checks", "files", "reporting"},
}
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")
}


def imports(path):
    """Full names of what a module imports: ``mtnrec.schema.Schema``, ``torch`` say."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    modules = [path for name, path in MODULES.items() if name.split("/")[0] == part]
    names = [name.split(".") for path in modules for name in imports(path)]
    found = {parts[1] for parts in names if parts[0] == "mtnrec"}

    assert modules
    assert found <= ALLOWED[part]


@pytest.mark.parametrize("model", ["layer", "shared_bottom", "esmm", "mmoe"])
def test_a_network_knows_nothing_of_lightning_metrics_and_optimisers(model):
    names = set(imports(MODULES[f"model/{model}"]))

    strangers = ("lightning", "mtnrec.metric", "mtnrec.optimizer")
    assert not [name for name in names if name.startswith(strangers)]


def test_a_training_starts_without_the_libraries_that_it_does_not_use():
    code = """
import sys
import mtnrec.train, mtnrec.data.synthetic, mtnrec.data.aliexpress
print(*sorted({"numba", "pandas", "polars", "pyarrow", "sklearn", "wandb"} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
