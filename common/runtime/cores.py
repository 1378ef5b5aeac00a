"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")  # where Linux mounts control groups
OWN_GROUP = Path("/proc/self/cgroup")  # the group of this process, one line a hierarchy


def usable_cores(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """The smallest of: cores of the machine, CPU affinity, CPU quota (rounded up); 1 or more.

    Batch systems set an affinity, containers (`docker run --cpus 4`, Kubernetes' limits) a quota.

    Args:
        groups: the folder in which control groups are mounted, version 1 or 2.
        own_group: the file that names this process's control groups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min([cores or 1, *_quotas(groups, own_group)])


def _quotas(groups: Path, own_group: Path) -> list[int]:
    """CPU quotas of this process's control group and of all groups above it, in whole cores."""
    try:
        lines = own_group.read_text().splitlines()
    except OSError:  # not Linux
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = groups / "cpu" if controllers else groups
        group = mount / path.lstrip("/")
        # A container may see its own group as the mount itself: a folder below it is then missing.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                quotas.append(_quota(folder))
    return [quota for quota in quotas if quota]


def _quota(folder: Path) -> int | None:
    """Whole cores that a control group may use; None if it has no limit or is not there."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return None
    return None if quota in ("max", "-1") else math.ceil(int(quota) / int(period))
