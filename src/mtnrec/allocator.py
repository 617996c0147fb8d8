"""What the C library does with memory that is freed, and torch with what it allocates."""

import ctypes

import torch

# mallopt(3) of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST = 2**31 - 1


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
