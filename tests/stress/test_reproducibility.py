"""The same cell in processes of its own, with the script that trains it many more times."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("reproducibility.py")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shared_bottom", "esmm", "mmoe"])
def test_processes_alike_end_with_the_same_bits_and_threads_change_no_draw(model):
    command = [sys.executable, str(SCRIPT), "--runs", "2", "--models", model]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 0, done.stderr
    assert f"| {model} | 1 |{' 2 of 2 |' * 8}\n" in done.stdout
    # The order of the rows, the noise, the first weights and the stream of dropout.
    assert f"| {model} |{' same bits |' * 3} " in done.stdout
