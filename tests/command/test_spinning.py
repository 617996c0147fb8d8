import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtnrec.command import entry_point
from mtnrec.command.entry_point import limit_spinning

COMMANDS = [
    path
    for path in sorted(Path(entry_point.__file__).parents[1].glob("*.py"))
    if "@entry_point(" in path.read_text(encoding="utf-8")
]
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_every_command_imports_its_entry_point_before_anything_that_imports_torch(command):
    modules = re.findall(r"^from (mtnrec\S*) import", command.read_text(encoding="utf-8"), re.M)

    before = modules[: modules.index("mtnrec.command.entry_point")]
    assert len(COMMANDS) >= 8
    assert set(before) <= {"mtnrec.checks"}


@pytest.mark.slow
def test_openmp_takes_the_limit():
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "import mtnrec.command.entry_point, torch"],
        env=variables | {"OMP_DISPLAY_ENV": "VERBOSE"},
        check=True,
        capture_output=True,
        text=True,
    )

    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not use GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_a_setting_of_the_user_has_precedence(monkeypatch, given, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    limit_spinning()

    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == expected
