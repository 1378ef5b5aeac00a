"""Running a script as a user types it, and reading what it leaves."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def on_two_ranks(arguments: Sequence[str]) -> list[str]:
    """The same command under torchrun."""
    return [*LAUNCHER, *arguments[1:]]


def command_line(script: str, settings: Mapping[str, object], *extra: str) -> list[str]:
    """The command that runs a script of the repository with these settings.

    In fp32 unless they say otherwise: processors that multiply bf16 would compute other values.
    """
    settings = {"precision": "fp32", **settings}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / script), *flags, *extra]


def run_here(experiment: str, settings: Mapping[str, object], run_dir: Path) -> None:
    """The run of `command_line` in this process, which is quicker than one as a user types it."""
    script = importlib.import_module(f"{experiment}.run")
    settings = {"precision": "fp32", "run-dir": str(run_dir), **settings}
    torch.set_num_threads(1)  # as in the processes it is compared with
    fields = {name.replace("-", "_"): value for name, value in settings.items()}
    script.main(script.Config(**fields))


def run(arguments: Sequence[str], status: int = 0, **options) -> subprocess.CompletedProcess[str]:
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, **options}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start_until(arguments: Sequence[str], checkpoint: Path) -> subprocess.Popen[str]:
    """Start a command and come back as soon as its checkpoint is there.

    `previous.pt` counts once it is no longer last.pt under another name.
    """
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not _is_written(checkpoint):
        time.sleep(0.002)
    return process


def _is_written(checkpoint: Path) -> bool:
    if not checkpoint.exists() or checkpoint.name != "previous.pt":
        return checkpoint.exists()
    return not checkpoint.samefile(checkpoint.with_name("last.pt"))


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and, under torchrun, its ranks, which would outlive it."""
    for victim in [*_children(process.pid), process.pid]:
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(victim, signal.SIGKILL)
    process.communicate()


def _children(parent: int) -> list[int]:
    """By Linux's list of processes."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc on this system")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # processes come and go
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(folder.name))
    return found


def metrics(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name != "images_per_second"} for row in rows
    ]


def state(run_dir: Path, name: str = "last.pt") -> dict:
    return torch.load(run_dir / name, weights_only=True)


def assert_equal(ours: object, theirs: object, where: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            # Neither where a run is counts, nor the rates in its rows, on which their size depends.
            if key not in ("run_dir", "metrics"):
                assert_equal(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where} {index}")
    else:
        assert ours == theirs, where


def assert_target_follows(start: torch.nn.Module, run_dir: Path, online_passes: int) -> None:
    """BYOL's target after one step: an average of `start` and of where the online network is now.

    Args:
        start: the online network before the step.
        online_passes: of the online network in the step.
    """
    online, target = state(run_dir)["model"], state(run_dir)["target"]
    assert online.keys() == target.keys()
    for name, begun in start.named_parameters():
        expected = 0.99 * begun.detach().double() + 0.01 * online[name].double()
        torch.testing.assert_close(target[name].double(), expected, rtol=1e-6, atol=1e-8)
    moved = [name for name, begun in start.named_parameters() if not begun.equal(online[name])]
    assert "backbone.conv1.weight" in moved
    assert "predictor.3.weight" in moved
    assert online["backbone.bn1.num_batches_tracked"] == online_passes
    assert target["backbone.bn1.num_batches_tracked"] == 2  # each target view once
    assert target["predictor.1.num_batches_tracked"] == 0
