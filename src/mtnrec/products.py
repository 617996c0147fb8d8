"""Which library multiplies matrices in float32 on a CPU."""

import platform
from pathlib import Path

import torch
from torch import Tensor

_SHAPES = ((64, 64, 1), (96, 2048, 64), (512, 224, 300))  # rows, inner, columns
_ROUNDING = 1e-6  # of the sum of magnitudes: float32 rounds 1e-7 of it, bfloat16 4e-3


def choose_products(device: torch.device) -> bool:
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
    if not _are_exact():
        setting.fp32_precision = before
    return setting.fp32_precision != before


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
