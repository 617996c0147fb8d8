import platform
import resource
import subprocess
import sys
from unittest import mock

import pytest
import torch

from mtnrec.system import performance as machine
from mtnrec.system.performance import keep_freed_memory, prefer_onednn_matmul

CPU = torch.device("cpu")

PAGES = """
import resource, sys, torch
from mtnrec.system.performance import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns freed memory")
def test_freed_memory_is_not_faulted_in_again():
    pages = {}
    for what in ("keep", "leave"):
        command = [sys.executable, "-c", PAGES, what]
        pages[what] = int(subprocess.run(command, check=True, capture_output=True).stdout)

    expected = 20 * (64 << 20) // resource.getpagesize()
    assert pages["leave"] > 0.5 * expected
    assert pages["keep"] < 0.02 * expected


def test_a_system_without_glibc_is_not_changed(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())

    assert not keep_freed_memory()


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(machine, "_is_amd", lambda: True)


@pytest.mark.parametrize("shape", [(1, 5, 3), (2048, 201, 512), (256, 2048, 512), (2176, 512, 64)])
def test_products_have_float32_precision_on_any_processor(amd, product_setting, shape):
    prefer_onednn_matmul(CPU)  # changes nothing on a processor that rounds
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    exact = a.double() @ b.double()
    error = torch.finfo(torch.float32).eps * inner**0.5

    for product in (a @ b, (b.T @ a.T).T, torch.stack([a, a]) @ b, torch.addmm(b[0] * 0, a, b)):
        assert ((product - exact).abs() <= error * (a.abs() @ b.abs())).all()


def test_a_processor_that_would_round_to_bfloat16_keeps_its_setting(
    amd, product_setting, monkeypatch
):
    monkeypatch.setattr(
        machine, "_multiply", lambda a, b: (a.bfloat16() @ b.bfloat16()).to(torch.float32)
    )

    assert not prefer_onednn_matmul(CPU)
    assert product_setting.fp32_precision == "ieee"


def test_an_exact_amd_processor_multiplies_with_onednn(amd, product_setting, monkeypatch):
    monkeypatch.setattr(machine, "_multiply", lambda a, b: (a.double() @ b.double()).float())

    assert prefer_onednn_matmul(CPU)
    assert product_setting.fp32_precision == "bf16"


def test_a_tuned_process_keeps_freed_memory_and_leaves_new_memory_unfilled(monkeypatch):
    calls = mock.Mock()
    for name in ("keep_freed_memory", "prefer_onednn_matmul"):
        monkeypatch.setattr(machine, name, getattr(calls, name))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)

    machine.tune_process(CPU)

    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert calls.mock_calls == [mock.call.keep_freed_memory(), mock.call.prefer_onednn_matmul(CPU)]


@pytest.mark.parametrize(("vendor", "device"), [("Intel", "cpu"), ("AMD", "cuda")])
def test_other_processors_and_devices_keep_their_setting(
    product_setting, monkeypatch, vendor, device
):
    monkeypatch.setattr(machine, "_is_amd", lambda: vendor == "AMD")

    assert not prefer_onednn_matmul(torch.device(device))
    assert product_setting.fp32_precision == "ieee"


def test_the_choice_does_not_change_random_numbers(amd, product_setting):
    before = torch.get_rng_state()
    prefer_onednn_matmul(CPU)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False)],
)
def test_the_vendor_is_read_on_linux(monkeypatch, tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")

    assert machine._is_amd() is expected


def test_the_vendor_is_read_on_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "absent")
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 26 Model 2, AuthenticAMD")

    assert machine._is_amd()
