"""Running a script as a user types it, and reading what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def command_line(script: str, settings: Mapping[str, object], *extra: str) -> list[str]:
    """The command that runs a script of the repository with these settings."""
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / script), *flags, *extra]


def run(arguments: Sequence[str], status: int = 0, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env=environment, **options
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


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
            # Where a run lies is no part of it; rows hold rates, so the log's length differs.
            if key not in ("run_dir", "metrics_bytes"):
                assert_equal(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where} {index}")
    else:
        assert ours == theirs, where
