"""Keep the memory of one training step for the next."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning every large block to the system.

    Otherwise each step maps its gradients anew, and the system clears them page by page: a third of sd15's
    backward pass on a CPU, 1.1 million page faults (`python -m lab.bench_step`). Without glibc, nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
