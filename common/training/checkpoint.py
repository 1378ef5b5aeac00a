"""Checkpoints that a kill, a full disk or a broken file cannot take away."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common.runtime.errors import UserError


def write_whole(path: Path, state: Mapping[str, Any]) -> None:
    """Write a file so that at any moment it is the old one or the new one, whole.

    Raises:
        OSError: if it cannot be written; the old one then stands.
    """
    # By way of memory: writing to a file, torch.save tells a full disk as a RuntimeError.
    content = io.BytesIO()
    torch.save(dict(state), content)
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, its checksums verified, tensors and plain values only.

    Raises:
        UserError: if the file is missing or damaged; it is named.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        # torch.load does not look at the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # The one thing no checksum covers, yet torch reads: an entry marked as a folder.
            for entry in archive.infolist():
                if entry.external_attr:
                    damaged = entry.filename
        if damaged is not None:
            raise UserError(f"{path} is damaged (at {damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is damaged or not a checkpoint ({error})") from error


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between a checkpoint's settings and those wanted, by name; empty: nothing."""
    return "; ".join(
        f"{name} was {saved.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    )


class Checkpoints:
    """`<last>` and, in case that one breaks, `<previous>`, the one before it.

    Args:
        folder: where they lie.
        last, previous: their file names.
        way_out: what a user can do where both are damaged.
    """

    def __init__(
        self,
        folder: Path,
        last: str = "last.pt",
        previous: str = "previous.pt",
        way_out: str = "start anew with --fresh (nothing is deleted)",
    ) -> None:
        self.last = folder / last
        self.previous = folder / previous
        self.way_out = way_out
        self._last_is_damaged = False

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the last one as the previous one and write a new last one.

        The older previous one is let go first, so that two take up the disk and never three.

        Raises:
            OSError: if the new one cannot be written; `load` then still finds the last one.
        """
        self._keep_last()
        write_whole(self.last, state)
        self._last_is_damaged = False

    def _keep_last(self) -> None:
        if not self.last.exists() or self._last_is_damaged:
            return
        if self.previous.exists() and self.previous.samefile(self.last):
            return  # after a save that failed
        beside = self.previous.with_name(self.previous.name + ".partial")
        with suppress(FileNotFoundError):
            beside.unlink()
        try:
            # A second name for the same file: at no moment is there no last one.
            os.link(self.last, beside)
        except OSError:
            self.last.replace(self.previous)  # no hard links on this file system
        else:
            beside.replace(self.previous)

    def load(self) -> dict[str, Any] | None:
        """The last one; where it is damaged, the previous one, saying so; None where none is.

        Raises:
            UserError: if there are checkpoints and none can be read.
        """
        problems = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
            except UserError as error:
                problems.append(str(error))
                self._last_is_damaged = path == self.last
                continue
            for problem in problems:
                print(f"warning: {problem}; continuing from {path}")
            return state
        if problems:
            raise UserError(
                f"{'; '.join(problems)}: nothing to continue from; restore a checkpoint, or "
                f"{self.way_out}"
            )
        return None
