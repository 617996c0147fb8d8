"""Memory available to a process, read from the files of the system."""

import os

import pytest

from mtnrec.system.resources import memory_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def write(tmp_path):
    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return write


def test_is_the_machines_where_nothing_limits_it(tmp_path, write):
    assert memory_bytes(tmp_path) == MACHINE  # not Linux

    root = write({"proc/self/cgroup": "0::/user.slice\n"})

    assert memory_bytes(root) == MACHINE


@pytest.mark.parametrize("own", ["max\n", "4096\n", "900\n"])
def test_is_the_smallest_limit_of_the_groups_of_the_process(write, own):
    root = write(
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "sys/fs/cgroup/slurm/memory.max": "4000\n",
            "sys/fs/cgroup/slurm/job_7/memory.max": "1000\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.max": own,
            "sys/fs/cgroup/slurm/job_8/memory.max": "10\n",
        }
    )

    assert memory_bytes(root) == (900 if own == "900\n" else 1000)


def test_supports_version_1_of_control_groups(write):
    root = write(
        {
            "proc/self/cgroup": "9:cpu,cpuacct:/job\n4:memory:/job:7\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/job:7/memory.limit_in_bytes": "5000\n",
        }
    )

    assert memory_bytes(root) == 5000


def test_a_container_finds_its_limit_at_the_top(write):
    root = write({"proc/self/cgroup": "0::/docker/0a1b\n", "sys/fs/cgroup/memory.max": "2000\n"})

    assert memory_bytes(root) == 2000
