"""The machine under a trial: what is freed stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from pipeline import machine

assert machine.select("cpu", 1, keep_memory=len(sys.argv) > 1).memory_kept == (len(sys.argv) > 1)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_faulted_in_again() -> None:
    def faults(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = (64 << 20) // 4096
    assert faults("keep") < pages // 100
    assert faults() > 10 * faults("keep")
