"""What the C library does with memory that tensors give back.

glibc returns freed blocks to the kernel when they are large or lie at the end of the heap, and takes them again, zeroed
page by page, for the next tensor of the same size. A forward pass on the CPU frees and takes the same few sizes
hundreds of times: without these page faults a crop of the real vision encoder takes a fifth less time and a prefix a
seventh (two Zen 4 cores under a hypervisor, 2026-11). Knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 1 << 30  # of freed memory at the end of the heap
LARGEST_HEAP_BLOCK = 32 << 20  # glibc allows no more; larger blocks are mapped, and faulted in, each time


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next tensors; return False where the C library is not glibc.

    Peak memory does not grow by it: what is kept was in use before.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK))


def return_freed_memory() -> None:
    """Give what is free back to the kernel, once: after weights were exchanged, whose sizes do not come again."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
