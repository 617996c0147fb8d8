"""Short runs of ``kill.py``, the script that kills and resumes a training."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill.py")


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_run_killed_three_times_ends_with_the_bits_of_an_uninterrupted_one(devices):
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--interrupts", "0.5"]
    command += ["--devices", devices]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr
    assert "3 kills, " in done.stdout
