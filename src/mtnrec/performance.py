"""What a process changes of the defaults of its machine, so that it computes faster."""

import ctypes
import platform
from pathlib import Path

import torch
from torch import Tensor

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1
_SHAPES = ((64, 64, 1), (96, 2048, 64), (512, 224, 300))  # rows, inner, columns
_ROUNDING = 1e-6  # of the sum of magnitudes: float32 rounds 1e-7 of it, bfloat16 4e-3


def tune_process(device: torch.device) -> None:
    """Keep memory and choose what multiplies, in the whole process; nothing changes but rounding.

    Args:
        device: Where the model computes.
    """
    keep_freed_memory()
    leave_memory_unfilled()
    prefer_onednn_matmul(device)


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, for what it allocates next.

    glibc maps every block of more than 32 MiB anew and gives it back when it is freed. The
    activations and gradients of a step are such blocks: each step would have the kernel clear them
    page by page, for a tenth to a third of the time of a step of MMoE on a CPU. The process stays
    as large as it once was.

    Returns:
        Whether there is a glibc that does so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def leave_memory_unfilled() -> None:
    """Let torch hand out memory as it is, under deterministic algorithms too.

    There it fills what it allocates, lest an operation read what it has not written. None of ours
    does, and filling takes a twentieth of a step.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def prefer_onednn_matmul(device: torch.device) -> bool:
    """Let oneDNN multiply in float32 on a processor of AMD, if it does so in float32.

    torch asks MKL, which uses half the width of these processors' AVX-512: two cores of a Zen 5
    make 215 GFLOP/s with it and 430 with oneDNN. torch asks oneDNN for float32 only along with
    leave to round to bfloat16, which oneDNN takes where the processor multiplies tiles (AMX), and
    AMD's do not. Some products are held against float64 all the same, and where one is rounded
    nothing is changed. Other devices are none of its concern.

    Args:
        device: Where the model computes.

    Returns:
        Whether oneDNN multiplies from now on, in the whole process.
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
        processor = platform.processor()  # Windows says who made it
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
