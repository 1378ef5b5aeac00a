"""A run's folder: its settings, metrics, TensorBoard events and checkpoints."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.losses.collapse import COLLAPSED_BELOW
from common.runtime.errors import UserError, require
from common.runtime.ranks import Ranks
from common.training.checkpoint import Checkpoints, differences, write_whole
from common.training.progress import Progress

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder go unnoticed there
    fcntl = None

REPOSITORY = Path(__file__).resolve().parents[2]

# Settings that leave the experiment what it is: where and how it runs, what is logged, how far it
# goes. Any other change is refused when a run is continued.
MAY_CHANGE = frozenset(
    {
        "device",
        "data_root",
        "workers",
        "prefetch",
        "pin_memory",
        "compile",
        "knn_every",
        "linear_epochs",
        "max_steps",
        "checkpoint_minutes",
        "run_dir",
        "fresh",
    }
)


class RunLog:
    """The folder of one run; only rank 0 writes.

    Args:
        folder: made where it is missing.
        config: the run's settings, plain values.
        fresh: start anew: `open` moves aside what an earlier run left in the folder.
        ranks: this process's place.

    Raises:
        UserError: if the folder cannot be written, or another process is at work in it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], fresh: bool, ranks: Ranks) -> None:
        folder = folder.resolve()
        self.folder = folder
        self.config = dict(config)
        self.fresh = fresh
        self.ranks = ranks
        self.checkpoints = Checkpoints(folder)
        self.metrics_path = folder / "metrics.jsonl"
        self.metrics_bytes = 0
        self._unwritten: list[str] = []
        self._warned = False
        self._lock: IO[str] | None = None
        self._board: SummaryWriter | None = None
        if ranks.is_main:
            self._lock = self._claim()
        ranks.wait()

    def _claim(self) -> IO[str] | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._take_lock()
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"the run directory {self.folder} cannot be written ({error.strerror}); "
                "choose another with --run-dir"
            ) from error
        return lock

    def _move_aside(self) -> None:
        if any(path.name != ".lock" for path in self.folder.iterdir()):
            aside = _first_free(self.folder)
            self.folder.rename(aside)
            self._lock = self._claim()
            self.tell(f"The earlier run lies in {aside}.")

    def _take_lock(self) -> IO[str] | None:
        if fcntl is None:
            return None
        lock = (self.folder / ".lock").open("w")
        try:
            # Not flock, which loader workers would inherit: they may outlive a killed run.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is at work in {self.folder}; wait for it, or choose another "
                "--run-dir"
            ) from None
        except OSError:
            return None  # a file system without locks
        return lock

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state to continue from, or None where there is none.

        Raises:
            UserError: if no checkpoint can be read, or its settings make another experiment.
        """
        if self.fresh:
            return None
        state = self.checkpoints.load()
        require(
            self.ranks.agree(state and (state.get("progress"), state.get("metrics_bytes"))),
            f"not every process finds the same checkpoint in {self.folder}; put --run-dir on a "
            "file system that all machines share",
        )
        if state is None:
            for name in ("best.pt", "backbone.pt"):
                if (self.folder / name).exists():
                    raise UserError(
                        f"{self.folder} holds {name} but no checkpoint to continue from; choose "
                        "another --run-dir, or start anew with --fresh (nothing is deleted)"
                    )
            return None
        if not {"config", "metrics_bytes"} <= state.keys():
            raise UserError(
                f"{self.checkpoints.last} is no checkpoint of a run; choose another --run-dir, or "
                "start anew with --fresh (nothing is deleted)"
            )
        saved, wanted = (
            {name: value for name, value in config.items() if name not in MAY_CHANGE}
            for config in (state["config"], self.config)
        )
        changed = differences(saved, wanted)
        if changed:
            raise UserError(
                f"{self.folder} holds a run with other settings: {changed}. Repeat its "
                "settings to continue it, choose another --run-dir, or start anew with --fresh "
                "(nothing is deleted)"
            )
        return state

    def open(self, metrics_bytes: int, next_epoch: int) -> None:
        """Start logging where the checkpoint left off.

        Args:
            metrics_bytes: length that metrics.jsonl is cut back to.
            next_epoch: TensorBoard forgets events of this epoch and later ones.
        """
        if not self.ranks.is_main:
            return
        try:
            if self.fresh:
                self._move_aside()
            self._write_config()
            with self.metrics_path.open("a") as file:
                self.metrics_bytes = min(metrics_bytes, self.metrics_path.stat().st_size)
                file.truncate(self.metrics_bytes)
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=next_epoch)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error}); make room, or choose another --run-dir"
            ) from error

    def _write_config(self) -> None:
        path = self.folder / "config.json"
        starts = []
        with suppress(OSError, ValueError, KeyError):
            starts = json.loads(path.read_text())["starts"] if self.metrics_path.exists() else []
        starts.append(
            {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "git_commit": _git_commit(),
                "device": _device_name(self.ranks),
                "processes": self.ranks.world_size,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "torchvision": torchvision.__version__,
                    "numpy": np.__version__,
                },
            }
        )
        text = json.dumps({"config": self.config, "starts": starts}, indent=2)
        beside = path.with_name("config.json.partial")
        beside.write_text(text + "\n")
        beside.replace(path)

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl, and its numbers to TensorBoard at `epoch`.

        Where the disk is full the row is kept and written with the next one or checkpoint.
        """
        if not self.ranks.is_main:
            return
        self._unwritten.append(json.dumps({"epoch": epoch, **row}) + "\n")
        try:
            self._write_rows()
        except OSError as error:
            self.tell(
                f"warning: {self.metrics_path} cannot be written now ({error}); kept for later"
            )
        if self._board is None:
            return
        try:
            for name, value in row.items():
                self._board.add_scalar(f"epoch/{name}", value, epoch)  # one group, x the epoch
            self._board.flush()
        except OSError as error:
            self.tell(
                f"warning: TensorBoard's events cannot be written ({error}); off from here on"
            )
            self._board = None

    def _write_rows(self) -> None:
        """Write what is unwritten, whole, or raise OSError."""
        if not self._unwritten:
            return
        with self.metrics_path.open("a") as file:
            file.truncate(self.metrics_bytes)  # a row that a full disk cut short
            file.write("".join(self._unwritten))
            file.flush()
            os.fsync(file.fileno())
        self.metrics_bytes = self.metrics_path.stat().st_size
        self._unwritten.clear()

    def picture(self, picture: Image.Image) -> None:
        """Save the picture of the views as views.png, and show it in TensorBoard."""
        if not self.ranks.is_main or self._board is None:
            return
        try:
            picture.save(self.folder / "views.png")
            self._board.add_image("views", np.asarray(picture), 0, dataformats="HWC")
            self._board.flush()
        except OSError as error:
            self.tell(f"warning: views.png cannot be written ({error})")

    def save(self, state: Mapping[str, Any], *, must: bool = False) -> None:
        """Write a checkpoint of `state`, to which settings and the length of the log are added.

        Args:
            must: raise where it cannot be written, instead of warning and trusting to the next.

        Raises:
            UserError: with `must`, if the disk is full.
        """

        def write() -> None:
            self._write_rows()
            self.checkpoints.save(
                {**state, "config": self.config, "metrics_bytes": self.metrics_bytes}
            )

        self._guard(self.checkpoints.last, write, must)

    def save_file(self, name: str, state: Mapping[str, Any], *, must: bool = False) -> None:
        """Write another file of tensors into the folder, on the CPU, so that it loads anywhere.

        Arguments as in `save`.
        """
        path = self.folder / name
        self._guard(path, lambda: write_whole(path, _on_cpu(state)), must)

    def _guard(self, path: Path, write: Callable[[], None], must: bool) -> None:
        if not self.ranks.is_main:
            return
        try:
            write()
        except OSError as error:
            problem = f"{path} cannot be written ({error}); the one before it stands"
            if must:
                raise UserError(
                    f"{problem}: make room, then the same command continues from there"
                ) from error
            self.tell(f"warning: {problem}, the next may go through")

    def tell(self, message: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if self.ranks.is_main:
            tqdm.write(message)
            sys.stdout.flush()

    def tell_epoch(self, epoch: int, epochs: int, row: Mapping[str, float]) -> None:
        """Print an epoch's row; warn once if the representation has collapsed."""
        shown = [f"{name} {value:.4g}" for name, value in row.items()]
        self.tell(f"epoch {epoch}/{epochs}: {', '.join(shown)}")
        if row["spread"] < COLLAPSED_BELOW and not self._warned:
            self._warned = True
            self.tell(
                f"warning: the representation has collapsed (spread {row['spread']:.3f}, healthy "
                "is near 1): all images are mapped to nearly the same z"
            )

    def tell_result(self, progress: Progress, linear: float | None) -> None:
        """Print what came out of the run and where it lies."""
        if progress.knn is not None and progress.untrained_knn is not None:
            self.tell(f"kNN accuracy     {progress.knn:.2f} %")
            self.tell(f"  untrained      {progress.untrained_knn:.2f} %")
        if linear is not None:
            self.tell(f"linear accuracy  {linear:.2f} %")
        self.tell(f"views            {self.folder / 'views.png'}")
        board = f"{sys.executable} -m tensorboard.main --logdir {self.folder}"
        self.tell(f"TensorBoard      {board}")
        self.tell(f"weights          {self.folder / 'backbone.pt'}")
        self.tell(f"metrics          {self.metrics_path}")

    def close(self) -> None:
        """Close TensorBoard's files and let other processes into the folder."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: _on_cpu(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, torch.Tensor) else state


def _first_free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


def _git_commit() -> str | None:
    """The checkout's commit, "-dirty" behind it where files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    return f"{ranks.device.type} ({platform.machine()}, {os.cpu_count()} cores)"
