"""A new experiment is a copy of a folder: nothing is registered or installed again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scripts import ROOT, command_line, metrics, run

SMALL = {
    "dataset": "shapes",
    "width": 8,
    "projector-dim": 16,
    "predictor-dim": 8,
    "batch-size": 32,
    "max-steps": 1,
    "linear-epochs": 0,
    "knn-every": 0,
    "device": "cpu",
}


def test_a_copied_folder_trains_under_its_new_name(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "common", clone / "common")
    shutil.copytree(ROOT / "simsiam_cifar10", clone / "my_method")
    for path in (clone / "my_method").glob("*.py"):
        path.write_text(path.read_text().replace("simsiam_cifar10", "my_method"))
    words = command_line("simsiam_cifar10/run.py", SMALL)
    words[1] = str(clone / "my_method" / "run.py")
    # A clone that was installed is on Python's path; here PYTHONPATH has the same effect.
    run(words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(clone)})
    (row,) = [row for row in metrics(clone / "runs" / "my_method" / "dssl-seed0") if "loss" in row]
    assert -1 <= row["symmetric"] <= 1
