"""What TensorBoard shows of a run."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

THUMBNAIL = 32  # side of an image in the projector, in pixels


class Board:
    """TensorBoard's event files: the numbers of each row over the epochs, and a picture.

    If they cannot be written, a warning is printed once and the run continues without them.

    Args:
        folder: of the event files.
        tell: prints a line.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.tell = tell
        self._writer: SummaryWriter | None = None

    def start(self, rows: Sequence[Mapping[str, Any]], next_epoch: int) -> None:
        """Begin a new event file, so that exactly these rows are shown.

        The events of `next_epoch` and of later ones, which came after the checkpoint, are
        invalidated. An event of the last row's epoch may have come after it too: that epoch is
        invalidated and written again.

        Args:
            rows: of the checkpoint.

        Raises:
            OSError: if it cannot be written.
        """
        first = next_epoch
        if rows:
            # Never epoch 0, which has the picture: its row is always older than the checkpoint's.
            first = min(first, max(1, rows[-1]["epoch"]))
        if not self.folder.exists():
            first = 0
        _quiet_writers()
        try:
            self._writer = SummaryWriter(self.folder, purge_step=first)
        except UnicodeEncodeError:
            self.tell(f"warning: TensorBoard cannot write to {self.folder}: the name is not UTF-8")
            return
        for row in rows:
            if row["epoch"] >= first:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Show a row's numbers at its epoch."""
        self._write(
            lambda writer: [
                writer.add_scalar(f"epoch/{name}", value, row["epoch"])  # one group
                for name, value in row.items()
                if name != "epoch"
            ]
        )

    def picture(self, name: str, picture: Image.Image, epoch: int) -> None:
        """Show a picture at an epoch."""
        pixels = np.asarray(picture)
        self._write(lambda writer: writer.add_image(name, pixels, epoch, dataformats="HWC"))

    def features(self, features: Tensor, images: Tensor, epoch: int) -> None:
        """Show images as points in TensorBoard's projector.

        Args:
            features: float `[N, d]` on the CPU.
            images: of the same N, uint8 `[N, 3, S, S]` on the CPU.
        """
        thumbnails = F.interpolate(images.float(), (THUMBNAIL, THUMBNAIL), mode="area") / 255

        def add(writer: SummaryWriter) -> None:
            with redirect_stdout(io.StringIO()):  # it warns where a finished run is typed again
                writer.add_embedding(
                    features, label_img=thumbnails, global_step=epoch, tag="features"
                )

        self._write(add)

    def _write(self, add: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            add(self._writer)
            self._writer.flush()
        except OSError as error:
            self.tell(f"warning: TensorBoard's events cannot be written ({error}): no more of them")
            self._writer = None

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None


@cache
def _quiet_writers() -> None:
    """Of errors in the threads that write events show no traceback: `Board` is told of them too."""
    show = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            show(arguments)

    threading.excepthook = hook
