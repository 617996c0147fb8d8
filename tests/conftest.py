"""Register the fixtures in the processes that run tests.

The pytest-xdist controller runs no tests, and its workers start sooner if it does not import torch.
"""

import gc
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Inherited by the processes that tests start: workers times threads must not exceed the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", 0)
    if runs_tests:
        gc.disable()  # until the tests are collected: what is imported stays
        for module in ("shared_fixtures", "run_fixtures"):
            config.pluginmanager.import_plugin(module)


def pytest_collection_finish() -> None:
    """Keep the collector from searching the imported modules and the tests again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files: a file is one unit of work, and at the end a worker waits."""
    longest = ("test_ddp", "test_launch", "test_train", "test_resume")
    items.sort(key=lambda item: item.path.stem not in longest)
