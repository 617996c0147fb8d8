"""Short runs of ``reproducibility.py``, the script that repeats the same run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("reproducibility.py")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shared_bottom", "esmm", "mmoe"])
def test_identical_processes_end_with_the_same_bits_and_threads_change_no_draw(model):
    command = [sys.executable, str(SCRIPT), "--runs", "2", "--models", model]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 0, done.stderr
    assert f"| {model} | 1 |{' 2 of 2 |' * 8}\n" in done.stdout
    # The row order, the noise, the initial weights and the dropout stream.
    assert f"| {model} |{' same bits |' * 3} " in done.stdout
