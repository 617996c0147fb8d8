"""Process-wide performance settings."""

import ctypes
import platform
from pathlib import Path

import torch
from torch import Tensor

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1
_SHAPES = ((64, 64, 1), (96, 2048, 64), (512, 224, 300))  # rows, inner, columns
_ROUNDING = 1e-6  # share of the sum of magnitudes: float32 rounds off 1e-7, bfloat16 4e-3


def tune_process(device: torch.device) -> None:
    """Apply all settings to the process; they change nothing but rounding.

    Args:
        device: Device of the model.
    """
    keep_freed_memory()
    leave_memory_unfilled()
    prefer_onednn_matmul(device)


def keep_freed_memory() -> bool:
    """Keep freed memory in the process for the next allocations.

    By default glibc maps every block above 32 MiB separately and unmaps it when it is freed. The
    activations and gradients of a step are such blocks, and the kernel would clear them page by
    page at each step, which takes a tenth to a third of a step of MMoE on a CPU. The process never
    shrinks below its peak.

    Returns:
        Whether glibc accepted the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def leave_memory_unfilled() -> None:
    """Keep torch from filling new memory under deterministic algorithms.

    It does so in case an operation reads memory that it has not written. None here does, and
    filling takes a twentieth of a step.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prefer_onednn_matmul(device: torch.device) -> bool:
    """Use oneDNN for float32 products on AMD processors, if its products are exact to float32.

    torch uses MKL, which uses half the width of AVX-512 on these processors: two cores of a Zen 5
    reach 215 GFLOP/s with MKL and 430 with oneDNN. torch uses oneDNN for float32 only if it may
    round to bfloat16, which oneDNN does only on processors with tile products (AMX), which AMD's
    lack. Some products are still compared with float64, and if one is rounded, the setting stays
    as it was. Devices other than CPUs are left alone.

    Args:
        device: Device of the model.

    Returns:
        Whether the process now uses oneDNN.
    """
    if device.type != "cpu" or not _is_amd() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    setting = torch.backends.mkldnn.matmul  # since torch 2.9
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    if _are_exact():
        return True
    setting.fp32_precision = before
    return False


def _is_amd() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        processor = platform.processor()  # on Windows it contains the vendor
    return "AuthenticAMD" in processor


def _are_exact() -> bool:
    stream = torch.Generator().manual_seed(0)
    for rows, inner, columns in _SHAPES:
        a = torch.randn(rows, inner, generator=stream)
        b = torch.randn(columns, inner, generator=stream).T
        exact, magnitude = a.double() @ b.double(), a.abs() @ b.abs()
        if (_multiply(a, b) - exact).abs().gt(_ROUNDING * magnitude).any():
            return False
    return True


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b
