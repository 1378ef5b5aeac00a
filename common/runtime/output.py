"""Standard output and standard error that cannot end a run."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from tqdm import tqdm


class Output(io.FileIO):
    """A file descriptor whose write errors are told once, on another one, and then ignored.

    A full disk, a pipe that nobody reads any more and a terminal that was closed give such errors.

    Args:
        descriptor: to write to; it is never closed.
        name: of the output, for the message.
        other: the descriptor for the message.
    """

    def __init__(self, descriptor: int, name: str, other: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.label = name
        self.other = other
        self.has_failed = False

    def write(self, data: bytes | memoryview) -> int:
        """Write what can be written; the rest counts as written."""
        size = memoryview(data).nbytes
        try:
            written = super().write(data)  # None: a descriptor that does not wait, and is busy
        except OSError as error:
            self._tell(error)
            return size
        return size if written is None else written

    def _tell(self, error: OSError) -> None:
        if self.has_failed:
            return
        self.has_failed = True
        reason = f"{self.label} cannot be written ({error.strerror})"
        message = f"\nwarning: {reason}; the run continues\n"
        with suppress(OSError):
            os.write(self.other, message.encode())


def protect_output() -> None:
    """Let everything that is printed, progress bars included, go through `Output`.

    Characters that the terminal's encoding does not have are printed as escapes. Where an output is
    closed, what is printed is dropped. Streams that were replaced before, as in a notebook, keep
    their own way of writing.
    """
    for name, label, descriptor in (
        ("stdout", "standard output", 1),
        ("stderr", "standard error", 2),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _dropped(descriptor))
            continue
        buffer = getattr(stream, "buffer", None)
        if type(getattr(buffer, "raw", buffer)) is io.FileIO:  # unbuffered streams have no `raw`
            with suppress(OSError):
                stream.flush()
            raw = Output(stream.fileno(), label, other=3 - descriptor)
            setattr(sys, name, _text(raw, stream.encoding))


def _text(raw: io.FileIO, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True
    )


def _dropped(descriptor: int) -> io.TextIOWrapper:
    """A stream to nowhere, which takes the free descriptor.

    Otherwise the next file to be opened, a checkpoint, could get it, and what libraries print from
    C would be written into that file.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(nowhere, descriptor)
    return _text(io.FileIO(nowhere, "w", closefd=False), "utf-8")


def say(message: str) -> None:
    """Print a line on standard output, above the progress bars."""
    tqdm.write(message)


def close_bars() -> None:
    """End the line of each progress bar, so that what follows starts on a line of its own."""
    for bar in list(tqdm._instances):
        bar.close()
