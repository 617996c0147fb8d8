import platform
import resource
import subprocess
import sys

import pytest

from mtnrec.allocator import keep_freed_memory

PAGES = """
import resource, sys, torch
from mtnrec.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_memory_that_is_freed_is_not_faulted_in_again():
    pages = {}
    for what in ("keep", "leave"):
        command = [sys.executable, "-c", PAGES, what]
        pages[what] = int(subprocess.run(command, check=True, capture_output=True).stdout)

    of_the_blocks = 20 * (64 << 20) // resource.getpagesize()
    assert pages["leave"] > 0.5 * of_the_blocks
    assert pages["keep"] < 0.02 * of_the_blocks


def test_a_system_without_glibc_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())

    assert not keep_freed_memory()
