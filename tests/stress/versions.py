"""Run the tests with the oldest allowed, the exact and the newest versions.

``make test-versions``, or ``python tests/stress/versions.py [oldest] [exact] [newest]``

Each row has its own environment, a folder below ``--folder`` that is reused if it exists:
``oldest`` takes the lower bound of every direct dependency in ``pyproject.toml``, ``exact`` the
versions of ``constraints.txt``, ``newest`` whatever pip finds. Indirect dependencies are the newest
allowed ones. Warnings of other versions are not failures here. The results are printed as a table.
"""

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from packaging.requirements import Requirement

from mtnrec.system.files import read_json

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "lightning", "torchmetrics", "hydra-core", "numpy", "pandas", "polars")


def lower_bounds() -> Iterator[str]:
    """Yield a pin at the lower bound for each requirement in ``pyproject.toml``, with extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                yield f"{requirement.name}=={bound.version}"


def constraints(row: str) -> str:
    """Return the constraints file of a row."""
    if row == "oldest":
        return "\n".join(lower_bounds())
    return (ROOT / "constraints.txt").read_text() if row == "exact" else ""


def install(row: str, interpreter: str, folder: Path) -> Path:
    """Create the environment of a row; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    pins = folder / "constraints.txt"
    pins.write_text(constraints(row))
    eager = ["--upgrade", "--upgrade-strategy=eager"] if row == "newest" else []
    pip = [python, "-m", "pip", "install", "--quiet", *eager, "--constraint", pins]
    subprocess.run([*pip, "--editable", f"{ROOT}[dev]"], check=True)
    return python


def versions_of(python: Path, folder: Path) -> list[str]:
    """Return the versions of Python and of the packages in ``SHOWN``."""
    listed = folder / "inspect.json"
    with listed.open("w") as file:
        subprocess.run([python, "-m", "pip", "inspect"], stdout=file, check=True)
    found = read_json(listed) or {}
    packages = {p["metadata"]["name"]: p["metadata"]["version"] for p in found["installed"]}
    return [found["environment"]["python_full_version"], *(packages[name] for name in SHOWN)]


def main() -> None:
    """Run the tests for each row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=["oldest", "exact", "newest"])
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that creates the environments"
    )
    parser.add_argument("--folder", type=Path, default=Path(".versions"))
    parser.add_argument("--tests", nargs="+", default=["tests", "src"])
    arguments = parser.parse_args()
    print(f"| | Python | {' | '.join(SHOWN)} | tests | date |\n|{'---|' * (len(SHOWN) + 4)}")
    failed = False
    for row in arguments.rows:
        folder = (arguments.folder / row).resolve()
        python = install(row, arguments.python, folder)
        pytest = [python, "-m", "pytest", "-q", "-W", "default", "-n", "auto", "--dist=loadfile"]
        done = subprocess.run(
            [*pytest, *arguments.tests], cwd=ROOT, capture_output=True, text=True, check=False
        )
        (folder / "tests.log").write_text(done.stdout + done.stderr)
        failed |= done.returncode != 0
        summary = done.stdout.strip().rpartition("\n")[2].strip("= ")
        cells = [row, *versions_of(python, folder), summary, f"{datetime.now(UTC):%Y-%m-%d}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
