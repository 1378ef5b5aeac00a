"""common/memory.py: what a process keeps of the memory that tensors have left."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from common.memory import keep_freed_memory
from processes import in_child

MEGABYTES = 400


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth_after_freeing(is_kept: bool) -> float:
    """How much larger the process is after a large tensor has come and gone."""
    if is_kept:
        keep_freed_memory()
    before = resident_megabytes()
    tensor = torch.ones(MEGABYTES * 2**20 // 4)
    assert resident_megabytes() - before > 0.9 * MEGABYTES
    del tensor
    return resident_megabytes() - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc alone")
def test_freed_memory_stays_with_the_process() -> None:
    assert in_child(lambda: growth_after_freeing(False)) < 0.1 * MEGABYTES
    assert in_child(lambda: growth_after_freeing(True)) > 0.9 * MEGABYTES
