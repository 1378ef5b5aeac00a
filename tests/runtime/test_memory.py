"""common/runtime/memory.py: what a process keeps of the memory that tensors have left."""

from __future__ import annotations

import platform
import sys

import pytest

from scripts import ROOT, run

MEBIBYTES = 400
# A process of its own, since a forked one inherits what its parent's has been told.
PROGRAM = f"""
import os
import torch
from common.runtime.memory import keep_freed_memory

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20

KEEP
before = resident()
tensor = torch.ones({MEBIBYTES} * 2**20 // 4)
print(resident() - before)
del tensor
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc alone")
@pytest.mark.parametrize(("keep", "share"), [("", 0), ("keep_freed_memory()", 1)])
def test_freed_memory_stays_with_the_process(keep: str, share: float) -> None:
    done = run([sys.executable, "-c", PROGRAM.replace("KEEP", keep)], cwd=ROOT)
    held, left = map(int, done.stdout.split())
    assert held == pytest.approx(MEBIBYTES, rel=0.1)
    assert left == pytest.approx(share * MEBIBYTES, abs=0.1 * MEBIBYTES)
