"""Freed tensors stay with the process, where the C library is glibc."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

COUNT_FAULTS = """
import resource, sys
import torch
from md3cli.model.network.allocator import keep_freed_memory

def faults_of_reuse():
    block = torch.ones(4 << 20)  # 16 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        del block
        block = torch.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
    faults_of_reuse()
print(faults_of_reuse())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_reused_memory_is_not_faulted_in_again() -> None:
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("keep", "return")
    )
    assert kept < 64
    assert returned > 4096  # so that the number above means something
