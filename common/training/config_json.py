"""A run's settings, and `config.json`, which has them and tells for each start what ran where."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import MISSING, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from common.runtime.errors import UserError, require
from common.runtime.files import write_whole
from common.runtime.precision import uses_bf16
from common.runtime.ranks import Ranks
from common.runtime.repository import git_commit
from common.training.lock import NAME as LOCK_NAME

Settings = Mapping[str, Any]  # plain values by name

# Settings that do not change the experiment: where and how it runs, what is logged, where it stops.
# A run is not continued with any other setting changed. `data_root` and `classes` are paths; the
# images that they lead to are compared by `common.data.fingerprint`.
MAY_CHANGE = frozenset(
    {
        "device",
        "data_root",
        "classes",
        "workers",
        "prefetch",
        "pin_memory",
        "skip_broken",
        "compile",
        "knn_every",
        "knn_images",
        "linear_epochs",
        "max_steps",
        "checkpoint_minutes",
        "run_dir",
        "fresh",
    }
)


def defaults_of(config: Any) -> dict[str, Any]:
    """The default of each field of a dataclass that has one."""
    return {one.name: one.default for one in fields(config) if one.default is not MISSING}


def with_newer(saved: Settings, wanted: Settings, defaults: Settings) -> dict[str, Any]:
    """Settings that an older version saved, with the default of each one that it did not know."""
    newer = {name: defaults[name] for name in wanted.keys() & defaults if name not in saved}
    return {**newer, **saved}


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between a checkpoint's settings and the present ones, by name; empty: none."""
    changed = [
        f"{name} was {saved[name]!r}, now {wanted[name]!r}"
        for name in sorted(saved.keys() & wanted.keys(), key=str)
        if saved[name] != wanted[name]
    ]
    for names, verb in (
        (saved.keys() - wanted.keys(), "has"),
        (wanted.keys() - saved.keys(), "lacks"),
    ):
        if names:
            changed.append(f"it {verb} the settings {', '.join(sorted(map(str, names)))}")
    return "; ".join(changed)


def of_the_experiment(config: Settings) -> dict[str, Any]:
    """The settings that must not change within a run."""
    return {name: value for name, value in config.items() if name not in MAY_CHANGE}


def require_same_settings(
    saved: Settings, wanted: Settings, defaults: Settings, folder: Path
) -> list[str]:
    """Refuse to continue a run as another experiment.

    A setting that is newer than the run counts as its default. A setting that the scripts no longer
    have is refused: nothing tells what it does now.

    Args:
        saved: the run's settings.
        wanted: the settings now.
        defaults: of the settings now.
        folder: of the run, for the message.

    Returns:
        The settings that are newer than the run.

    Raises:
        UserError: naming each setting that differs and is not in `MAY_CHANGE`.
    """
    whole = with_newer(saved, wanted, defaults)
    newer = sorted(whole.keys() - saved)
    then, now = of_the_experiment(whole), of_the_experiment(wanted)
    changed = differences(then, now)
    unlike = [name for name in newer if name in now and now[name] != then[name]]
    if unlike:
        changed += f"; the run began before {', '.join(unlike)} existed: leave that at its default"
    remedy = "Repeat its settings to continue it"
    if then.keys() - now:
        remedy = "Continue it with the version that began it (config.json has the commit)"
    require(
        not changed,
        f"{folder} holds a run with other settings: {changed}. {remedy}, choose another "
        "--run-dir, or start a new run with --fresh (nothing is deleted)",
    )
    return newer


def read_config(path: Path) -> dict[str, Any] | None:
    """A run's config.json: "config" and "starts"; None: no file, or not readable.

    Raises:
        UserError: if the file is valid but not of a run; what is missing in it is named.
    """
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if content is None:
        return None
    for name, kind in (("config", dict), ("starts", list)):
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, kind):
            raise UserError(
                f"{path} is not of a run of this repository: it has no {kind.__name__} {name!r}; "
                "choose another --run-dir"
            )
    return content


def _job() -> str | None:
    """The cluster's or torchrun's name of the job that this process belongs to; None: no name."""
    name = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # torchrun's, where --rdzv-id is missing


def began_in_this_job(path: Path, config: Settings) -> bool:
    """Whether this job itself began the run of a config.json, and was then restarted.

    By SLURM, which requeues a job, or by `torchrun --max-restarts`. Both repeat the command, with
    `--fresh` if that is in it.

    Args:
        path: of config.json.
        config: the settings now; a run with others, which the same job may have trained before, is
            another one.
    """
    counts = (os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC"))
    if _job() is None or all(count == "0" for count in counts):
        return False
    saved = read_config(path)
    if not saved or not saved["starts"] or saved["starts"][-1].get("job") != _job():
        return False
    now = json.loads(json.dumps(dict(config)))  # tuples become lists, as in the file
    return of_the_experiment(saved["config"]) == of_the_experiment(now)


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but a run's lock."""
    return all(path.name == LOCK_NAME for path in folder.iterdir())


def require_run_or_empty(folder: Path) -> None:
    """Refuse to move aside what is not a run's folder, such as the data set.

    Raises:
        UserError: if the folder has anything but a run in it, or cannot be read.
    """
    try:
        if not folder.is_dir() or is_empty(folder):
            return
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); choose another --run-dir"
        ) from error
    is_run = read_config(folder / "config.json") is not None
    require(
        is_run or {"metrics.jsonl", "tensorboard"} <= names,
        f"{folder} is not a run's folder (it has no config.json), so --fresh does not move it "
        "aside; choose another --run-dir",
    )


def write_config(
    path: Path, config: Mapping[str, Any], ranks: Ranks, *, continues: bool = False
) -> list[str]:
    """Write the settings, and add this start to the earlier ones.

    Args:
        continues: whether the run has a checkpoint.

    Returns:
        Warnings: that the file was damaged, that a run continues in another precision, or on CPUs
        with another number of processes.

    Raises:
        OSError: if it cannot be written.
        UserError: as `read_config`.
    """
    earlier = read_config(path)
    warnings = []
    if earlier is None and path.exists():
        warnings.append(f"{path} was damaged; earlier starts are lost")
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "job": _job(),
        "git_commit": git_commit(),
        "device": _device_name(ranks),
        "processes": ranks.world_size,
        "precision": "bf16" if uses_bf16(config["precision"], ranks.device) else "fp32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
    }
    starts = [*(earlier["starts"] if earlier else []), start]
    before = {**start, **starts[-2]} if continues and len(starts) > 1 else start
    if before["precision"] != start["precision"]:
        warnings.append(
            f"the run was in {before['precision']} until now and continues in "
            f"{start['precision']}, because --precision auto follows the hardware"
        )
    if ranks.device.type == "cpu" and before["processes"] != start["processes"]:
        warnings.append(
            f"the run had {before['processes']} processes until now and continues with "
            f"{start['processes']}: on CPUs BatchNorm normalises each process's images by "
            "themselves"
        )
    text = json.dumps({"config": dict(config), "starts": starts}, indent=2)
    write_whole(path, (text + "\n").encode())
    return warnings


def _device_name(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    return f"{ranks.device.type} ({platform.machine()}, {os.cpu_count()} cores)"
