"""Checkpoints that a kill, a full disk or a damaged file cannot destroy."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import textwrap
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from common.runtime.errors import UserError
from common.runtime.files import write_whole
from common.runtime.memory import is_out_of_memory
from common.runtime.output import say

# The first bytes of files that torch before 1.6 wrote: a pickled number, the format's mark.
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _MissingError(UserError):
    """There is no such file."""


class _UnreadableError(UserError):
    """A file that the system does not give away now; its content may be intact."""


class Stateful(Protocol):
    """What can be part of a checkpoint: a module, an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


def serialise(state: Mapping[str, Any]) -> memoryview:
    """The bytes of a file of tensors and plain values."""
    # In memory: when torch.save writes to a full disk, it raises RuntimeError, not OSError.
    content = io.BytesIO()
    torch.save(dict(state), content)
    return content.getbuffer()


def on_cpu(state: Any) -> Any:
    """The same dictionaries, with copies on the CPU of tensors that are elsewhere."""
    if isinstance(state, Mapping):
        return {name: on_cpu(value) for name, value in state.items()}
    return state.cpu() if isinstance(state, torch.Tensor) else state


def read_checkpoint(path: Path, *, with_objects: bool = False) -> dict[str, Any]:
    """Read a file of tensors and plain values to the CPU; code in it is never executed.

    Checksums are verified. The format of torch before 1.6, which has none, is read too.

    Args:
        with_objects: accept a file that also holds objects of any classes, such as the settings of
            another program; what is read in their place has no use. Not in the format before 1.6.

    Raises:
        UserError: if the file is missing, cannot be read, is damaged or holds anything else; it is
            named.
    """
    return _require_names(_read(path, with_objects=with_objects), path)


def _read(path: Path, *, with_objects: bool = False) -> object:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a regular file, so it cannot be a checkpoint")
        with path.open("rb") as file:
            is_old_format = file.read(len(OLD_FORMAT)) == OLD_FORMAT
        if not is_old_format:
            _verify_checksums(path)
        if with_objects and not is_old_format:
            # Where even the stand-ins do not fit, the line after this says what the file holds.
            with suppress(Exception), _stand_ins(path):
                return torch.load(path, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _MissingError(f"{path}: no such checkpoint") from error
    except Exception as error:  # a damaged pickle can raise anything
        if is_out_of_memory(error):
            raise
        # A damaged archive can send zipfile to a place before its start: an invalid argument.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise _UnreadableError(f"{path} cannot be read ({error.strerror})") from error
        raise UserError(f"{path} {_reason(error)}") from error


class _StandIn:
    """In place of a class or function that a file names: calling it gives an object without use."""

    def __new__(cls, *arguments: object) -> object:
        if cls.__module__.partition(".")[0] == "numpy":  # the state of its objects is a tuple
            return super().__new__(cls)
        return OrderedDict()  # the one kind that torch's safe reader lets have items and attributes

    def __setstate__(self, state: object) -> None:
        """Drop it."""


def _stand_ins(path: Path) -> AbstractContextManager:
    """Within it, torch's safe reader takes a stand-in for every class that it would refuse.

    The classes themselves are neither imported nor called.
    """
    stand_ins = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        module, _, own_name = name.rpartition(".")
        stand_ins.append(type(own_name, (_StandIn,), {"__module__": module}))
    return torch.serialization.safe_globals(stand_ins)


def _require_names(state: object, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(
            f"{path} is another kind of file: it holds a {type(state).__name__}, not a dictionary "
            "with names as keys"
        )
    return state


def _verify_checksums(path: Path) -> None:
    """Check what torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is None and not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise UserError(f"{path} is another kind of file: a zip archive without weights")
        # No checksum covers the mark of a folder, and torch reads an entry with it as empty.
        for entry in archive.infolist():
            if entry.external_attr:
                damaged = entry.filename
    if damaged is not None:
        raise UserError(f"{path} is damaged (at {damaged})")


def _reason(error: Exception) -> str:
    """Why a file was not read. Torch's own message would advise to turn its protection off."""
    text = str(error)
    if "weights_only" not in text and "Weights only" not in text:
        return f"is damaged or not a checkpoint ({first_line(error)})"
    found = re.search(r"GLOBAL ([\w.]+)", text)
    named = f", {found[1]}" if found else ""
    return (
        f"is not loaded: it holds more than tensors and plain values{named}, and reading it could "
        "execute code of others; with the program that wrote it save the state dict alone: "
        "torch.save(network.state_dict(), FILE)"
    )


def first_line(error: Exception) -> str:
    """The start of an error's message, for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "Error(s) in loading state_dict for …:" is followed by what is wrong.
    reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines or [repr(error)])[0]
    return textwrap.shorten(reason, 160, placeholder=" …")


def require_entries(state: Mapping[str, Any], entries: Mapping[str, type], path: Path) -> None:
    """Refuse a file that is not of the expected kind.

    Args:
        entries: names that `state` must have, with the type of each value.

    Raises:
        UserError: naming the entry that is missing or has another type.
    """
    for name, kind in entries.items():
        if name not in state:
            raise UserError(f"{path} is another kind of file: it has no entry {name!r}")
        if not isinstance(state[name], kind):
            raise UserError(
                f"{path} is another kind of file: its entry {name!r} is a "
                f"{type(state[name]).__name__}, not a {kind.__name__}"
            )


def restore(parts: Mapping[str, Stateful], saved: Mapping[str, Any], path: Path) -> None:
    """Load the state of each part from a checkpoint.

    Args:
        path: of the checkpoint, for the message.

    Raises:
        UserError: naming the part that is missing or does not fit.
    """
    for name, part in parts.items():
        require_entries(saved, {name: dict}, path)
        try:
            part.load_state_dict(saved[name])
        except Exception as error:  # other content can raise anything
            raise UserError(f"{path}: its {name!r} does not fit ({first_line(error)})") from error


class Checkpoints:
    """The file `last`, and `previous`, the one before it, in case `last` is damaged.

    Args:
        folder: of both files.
        last, previous: their names.
        remedy: what a user can do if both are damaged.
    """

    def __init__(
        self,
        folder: Path,
        last: str = "last.pt",
        previous: str = "previous.pt",
        remedy: str = "start a new run with --fresh (nothing is deleted)",
    ) -> None:
        self.last = folder / last
        self.previous = folder / previous
        self.remedy = remedy
        self._last_is_damaged = False

    def save(self, state: Mapping[str, Any]) -> None:
        """Rename the last checkpoint to the previous one and write a new last one.

        The older previous one is deleted first, so that there are never three on the disk.

        Raises:
            OSError: if the new one cannot be written; `load` then still finds the last one.
        """
        content = serialise(state)
        self._keep_last()
        write_whole(self.last, content)
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
            # A second name for the same file: at every moment there is a last one.
            os.link(self.last, beside)
        except OSError:
            self.last.replace(self.previous)  # no hard links on this file system
        else:
            beside.replace(self.previous)

    def load(self, entries: Mapping[str, type]) -> dict[str, Any] | None:
        """The last checkpoint; if it is damaged, the previous one, with a warning; None: no file.

        Args:
            entries: names and types of what a checkpoint must hold.

        Raises:
            UserError: if there are checkpoints and each is damaged, or the one that is not is a
                file of another kind, or the system does not give one away.
        """
        problems = []
        for path in (self.last, self.previous):
            try:
                content = _read(path)
            except _MissingError:
                continue
            except _UnreadableError as error:
                raise UserError(
                    f"{error}; it may be intact: repeat the command when it can be read, or move "
                    "it to another folder to continue without it"
                ) from error
            except UserError as error:
                problems.append(str(error))
                self._last_is_damaged = path == self.last
                continue
            try:
                state = _require_names(content, path)
                require_entries(state, entries, path)
            except UserError as error:
                raise UserError(f"{error}; move it to another folder, or {self.remedy}") from error
            for problem in problems:
                say(f"warning: {problem}; continuing from {path}")
            return state
        if problems:
            raise UserError(
                f"{'; '.join(problems)}: nothing to continue from; restore a checkpoint, or "
                f"{self.remedy}"
            )
        return None
