"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write so that at any moment its name has the old content or the new, complete.

    A link of that name is replaced, not followed. After an error the old content is kept.

    Raises:
        OSError: if it cannot be written.
    """
    beside = path.with_name(path.name + ".partial")
    try:
        with suppress(FileNotFoundError):
            beside.unlink()
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    _sync_folder(path.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one piece; arguments and errors as `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
