"""Register the fixtures in the processes that run tests.

The pytest-xdist controller runs no tests, and its workers start sooner if it does not import torch.
"""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Inherited by the processes that tests start: workers times threads must not exceed the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", 0)
    if runs_tests:
        for module in ("shared_fixtures", "run_fixtures"):
            config.pluginmanager.import_plugin(module)
