"""A run's folder: its settings, metrics, TensorBoard events and checkpoints."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from common.losses.collapse import COLLAPSED_BELOW
from common.runtime.errors import UserError, require
from common.runtime.files import write_whole
from common.runtime.output import say
from common.runtime.ranks import Ranks
from common.training.best import best_accuracy
from common.training.board import Board
from common.training.checkpoint import Checkpoints, on_cpu, serialise
from common.training.config_json import (
    Settings,
    began_in_this_job,
    is_empty,
    read_config,
    require_run_or_empty,
    require_same_settings,
    write_config,
)
from common.training.lock import FolderLock
from common.training.metrics import Metrics, first_free
from common.training.progress import Progress


class RunLog:
    """The folder of one run; only rank 0 writes.

    If the folder is deleted or renamed during the run, it is made again at the next write.

    Args:
        folder: made if it does not exist.
        config: the run's settings, plain values.
        defaults: of the settings, for a run that an older version began.
        fresh: start a new run: `open` moves an earlier run's folder aside, unless the job itself
            began that run and was restarted.
        ranks: this process's place.

    Raises:
        UserError: if the folder cannot be written, if another process uses it, or, with `fresh`, if
            it holds anything but a run.
    """

    def __init__(
        self, folder: Path, config: Settings, defaults: Settings, fresh: bool, ranks: Ranks
    ) -> None:
        self.folder = folder = Path(os.path.realpath(folder))  # resolve() raises where links loop
        self.config = dict(config)
        self.defaults = defaults
        self.ranks = ranks
        self.checkpoints = Checkpoints(folder)
        self.config_path = folder / "config.json"
        # Of several machines torchrun may tell only one that it has restarted them.
        self.fresh = fresh and not ranks.any(began_in_this_job(self.config_path, self.config))
        self.metrics = Metrics(folder / "metrics.jsonl", self.tell)
        self._board = Board(folder / "tensorboard", self.tell)
        self._saved_rows = ""  # of the checkpoint
        self._waiting: dict[str, memoryview] = {}  # files that a full disk did not take
        self._warned = False
        self._lock: FolderLock | None = None
        if self.fresh:
            require_run_or_empty(folder)
        if ranks.is_main:
            self._lock = self._claim()
        ranks.wait()

    def _claim(self) -> FolderLock:
        try:
            lock = FolderLock(self.folder)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"the run directory {self.folder} cannot be written ({error.strerror}); "
                "choose another with --run-dir"
            ) from error
        return lock

    def _move_aside(self) -> None:
        if not is_empty(self.folder):
            aside = first_free(self.folder)
            self.folder.rename(aside)
            self._lock.release()
            self._lock = self._claim()
            self.tell(f"The earlier run was moved to {aside}.")

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state to continue from; None: a new run.

        Raises:
            UserError: if no checkpoint can be read, or its settings are of another experiment.
        """
        if self.fresh:
            return None
        read_config(self.config_path)  # refuses the folder of another program
        state = self.checkpoints.load({"config": dict, "metrics": str, "progress": dict})
        require(
            self.ranks.agree(state and (state["progress"], state["metrics"])),
            f"not every process finds the same checkpoint in {self.folder}; put --run-dir on a "
            "file system that all machines share",
        )
        if state is None:
            left = ["best.pt", "backbone.pt"] + ["metrics.jsonl"] * self.metrics.has_epochs()
            for name in left:
                if (self.folder / name).exists():
                    raise UserError(
                        f"{self.folder} has {name} but no checkpoint to continue from; choose "
                        "another --run-dir, or start a new run with --fresh (nothing is deleted)"
                    )
            return None
        newer = require_same_settings(state["config"], self.config, self.defaults, self.folder)
        if newer:
            self.tell(f"The run is older than these settings: {', '.join(newer)}")
        self._saved_rows = state["metrics"]
        known = state["progress"].get("best_knn")
        if known is not None:
            best = best_accuracy(self.folder / "best.pt", known, self.tell)
            state["progress"]["best_knn"] = best
        return state

    def open(self, next_epoch: int) -> None:
        """Start logging where the checkpoint ends.

        Args:
            next_epoch: TensorBoard's events of this epoch and of later ones are invalidated.
        """
        if not self.ranks.is_main:
            return
        try:
            if self.fresh:
                self._move_aside()
            settings = (self.config_path, self.config, self.ranks)
            for warning in write_config(*settings, continues=next_epoch > 0):
                self.tell(f"warning: {warning}")
            self.metrics.start(self._saved_rows)
            self._board.start(self.metrics.rows(), next_epoch)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error}); make room, or choose another --run-dir"
            ) from error

    def _ensure_folder(self) -> None:
        """Make the folder again if it was deleted or renamed.

        Raises:
            UserError: if that fails, or another run's folder has taken its name.
        """
        if self._lock is None or self._lock.is_folder_there():
            return
        before, self._lock = self._lock, self._claim()
        if self.config_path.exists():
            require(
                before.is_same_folder(),
                f"{self.folder} was renamed during the run, and another run's folder has its name "
                "now; rename that one, rename this run's folder back, and the same command "
                "continues the run",
            )
        else:
            self.tell(
                f"warning: {self.folder} was deleted or renamed during the run; it was made again, "
                "without the files written before"
            )
            write_config(self.config_path, self.config, self.ranks)
            self.metrics.flush()
            self._board.close()
            self._board.start(self.metrics.rows(), 0)
        before.release()

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl, and its numbers to TensorBoard at `epoch`.

        If the disk is full, the row is kept and written with the next one or the next checkpoint.
        """
        if not self.ranks.is_main:
            return
        row = {"epoch": epoch, **row}
        self.metrics.append(row)
        try:
            self._ensure_folder()
            self.metrics.flush()
        except OSError as error:
            self.tell(
                f"warning: {self.metrics.path} cannot be written now ({error}); its rows are "
                "written later"
            )
        self._board.add(row)

    def picture(self, name: str, picture: Image.Image, epoch: int) -> None:
        """Save a picture as `<name>.png`, and show it in TensorBoard at an epoch."""
        if not self.ranks.is_main:
            return
        content = io.BytesIO()
        picture.save(content, "PNG")
        self._write_file(f"{name}.png", content.getbuffer(), must=False)
        self._board.picture(name, picture, epoch)

    def features(self, features: Tensor, images: Tensor, epoch: int) -> None:
        """Show images by their features in TensorBoard; arguments as `Board.features`."""
        if self.ranks.is_main:
            self._board.features(features, images, epoch)

    def save(self, state: Mapping[str, Any], *, must: bool = False) -> None:
        """Write a checkpoint of `state`, with the settings and the rows of the metrics added.

        Args:
            must: raise if it cannot be written, instead of a warning.

        Raises:
            UserError: with `must`, if the disk is full.
        """

        def write(path: Path) -> None:
            own = {"config": self.config, "metrics": self.metrics.text}
            self.checkpoints.save({**state, **own})
            self.metrics.flush()

        if self._guard(self.checkpoints.last.name, write, must):
            for name, content in list(self._waiting.items()):
                self._write_file(name, content, must=False)

    def save_file(self, name: str, state: Mapping[str, Any], *, must: bool = False) -> None:
        """Write another file of tensors into the folder, on the CPU, so that it loads anywhere.

        If the disk is full, the file is written with a later checkpoint. Arguments as in `save`.
        """
        if self.ranks.is_main:
            self._write_file(name, serialise(on_cpu(state)), must)

    def _write_file(self, name: str, content: memoryview, must: bool) -> None:
        self._waiting[name] = content
        if self._guard(name, lambda path: write_whole(path, content), must):
            del self._waiting[name]

    def _guard(self, name: str, write: Callable[[Path], None], must: bool) -> bool:
        """Write a file of the folder; whether that succeeded."""
        if not self.ranks.is_main:
            return False
        path = self.folder / name
        try:
            self._ensure_folder()
            write(path)
        except OSError as error:
            problem = f"{path} cannot be written ({error}); the one before it is kept"
            if must:
                raise UserError(
                    f"{problem}: make room, then the same command continues from there"
                ) from error
            self.tell(f"warning: {problem}, and it is tried again with the next checkpoint")
            return False
        return True

    def tell(self, message: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.ranks.is_main:
            say(message)

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
        """Print the accuracies in percent, and which files the run has written."""
        if progress.knn is not None and progress.untrained_knn is not None:
            self.tell(f"kNN accuracy     {progress.knn:.2f} %")
            self.tell(f"  untrained      {progress.untrained_knn:.2f} %")
        if linear is not None:
            self.tell(f"linear accuracy  {linear:.2f} %")
        self.tell(f"views            {self.folder / 'views.png'}")
        if (self.folder / "neighbours.png").exists():
            self.tell(f"neighbours       {self.folder / 'neighbours.png'}")
        board = f"{sys.executable} -m tensorboard.main --logdir {self.folder}"
        self.tell(f"TensorBoard      {board}")
        self.tell(f"weights          {self.folder / 'backbone.pt'}")
        self.tell(f"metrics          {self.metrics.path}")

    def close(self) -> None:
        """Close TensorBoard's files and let other processes use the folder."""
        self._board.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
