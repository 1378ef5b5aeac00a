"""CPU quotas as the kernel writes them, version 1 and 2, in files of our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.runtime.cores import usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def cores(folder: Path, own_group: str, files: dict[str, str]) -> int:
    """`usable_cores` where /proc/self/cgroup and the files of /sys/fs/cgroup hold these texts."""
    (folder / "own").write_text(own_group)
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cores(folder / "cgroup", folder / "own")


@pytest.mark.parametrize(
    ("own_group", "files", "expected"),
    [
        # Version 2. In a container the group is the mount itself.
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
        ("0::/\n", {}, 8),
        # Groups above limit too; the root has no cpu.max.
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "500000 100000\n"}, 5),
        ("0::/a\n", {"b/cpu.max": "100000 100000\n"}, 8),
        # Version 1: a hierarchy each for some controllers.
        (
            "5:memory:/m\n4:cpu,cpuacct:/a\n3:cpuset:/\n",
            {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "50000\n"},
            5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        # A container that sees its own group as the mount, under the name that the host has for it.
        (
            "4:cpuacct,cpu:/docker/0123\n0::/system.slice\n",
            {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1000\n", "cpu/cpu.cfs_period_us": "1000\n"}, 8),
    ],
)
def test_the_smallest_quota_on_the_way_up_counts(
    tmp_path: Path, own_group: str, files: dict[str, str], expected: int
) -> None:
    assert cores(tmp_path, own_group, files) == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "missing") == 8
