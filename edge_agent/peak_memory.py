"""The trainer's own memory: a soft limit, the highest use, and giving freed memory back.

Knows Linux's /proc and torch's allocator. On a Jetson the GPU's memory is system memory that no
cgroup counts, so CUDA's part is limited and added separately. Valid on Python 3.8.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

_SHARE = 0.95
"""A little under the hard limit: an allocation fails, catchably, before the kernel kills."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1024 * 1024

_SIGNS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "could not create a memory",
    "could not create a primitive",  # oneDNN gets no memory for its generated code
    "NVML_SUCCESS",  # an assertion in torch's CUDA allocator when a Jetson's memory is used up
)


def limit_memory(limit_bytes: int | None) -> None:
    """Let allocations fail a little under ``limit_bytes``; None lifts the limit again."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if limit_bytes is None else int(limit_bytes * _SHARE)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if limit_bytes is None else min(1.0, soft / total)
        torch.cuda.set_per_process_memory_fraction(share)
        # CUDA maps far more than it uses; a limit on mappings would only break it.
        soft = hard
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def give_back_at_once() -> None:
    """From now on, memory of large tensors goes back to the system as soon as they are freed.

    Left alone, glibc keeps such memory for the next one and cuts it up: training held twice what it
    used (six layers, 32 x 128 tokens: 2,050 instead of 999 MB). Giving it back takes 40 % more time
    there, and none with short texts. Cannot be undone; without glibc nothing happens.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        set_option(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, in any of torch's wordings."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release_memory() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak(proc: Path = Path("/proc/self")) -> None:
    """Start a new peak measurement; without the right to, the old peak stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        (proc / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes(proc: Path = Path("/proc/self")) -> int:
    """Highest memory use since ``reset_peak``, in bytes: resident plus CUDA.

    Source: ``VmHWM`` in proc(5).
    """
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return _bytes_of(proc / "status", "VmHWM:") + int(cuda)


def available_bytes(limit_bytes: int | None, proc: Path = Path("/proc")) -> int:
    """Memory that this process may still take, in bytes.

    Args:
        limit_bytes: the limit given to ``limit_memory``.
        proc: where proc(5) is.
    """
    available = _bytes_of(proc / "meminfo", "MemAvailable:")
    if limit_bytes is None:
        return available
    return min(available, int(limit_bytes * _SHARE) - _bytes_of(proc / "self/status", "VmRSS:"))


def _bytes_of(path: Path, key: str) -> int:
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} has no {key}")
