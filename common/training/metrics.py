"""`metrics.jsonl`: the rows of a run, one JSON object a line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.runtime.files import write_whole


class Metrics:
    """The rows of a run, in a file and in memory.

    Before each write the file is compared with the rows in memory: a file that was deleted, moved,
    shortened or changed meanwhile is written again as a whole, with a warning.

    Args:
        path: of the file.
        tell: prints a line.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self.tell = tell
        self.text = ""
        self._written = 0  # bytes of the text that were written to the file

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return len(self.text.encode())

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were appended."""
        return [json.loads(line) for line in self.text.splitlines()]

    def has_epochs(self) -> bool:
        """Whether the file has rows of trained epochs; epoch 0 is of the untrained network."""
        return bool(re.search(rb'^{"epoch": [1-9]', self._read() or b"", re.MULTILINE))

    def start(self, saved: str) -> None:
        """Take over the rows of a checkpoint; rows that came after it are removed from the file.

        Args:
            saved: the rows' text.

        Raises:
            OSError: if the file cannot be written.
        """
        self.text = saved
        self._written = self.size
        self.flush()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; `flush` writes it."""
        self.text += json.dumps(dict(row)) + "\n"

    def flush(self) -> None:
        """Write the rows that are not in the file.

        Raises:
            OSError: if they cannot be written; a later `flush` writes them.
        """
        content = self.text.encode()
        expected, found = content[: self._written], self._read()
        if found is not None and found.startswith(expected):
            with self.path.open("r+b") as file:
                file.truncate(self._written)  # a row that a full disk or a kill cut short
                file.seek(self._written)
                file.write(content[self._written :])
                file.flush()
                os.fsync(file.fileno())
        else:
            moved = self._move_aside(found, content)
            write_whole(self.path, content)
            if expected:
                self.tell(
                    f"warning: {self.path} {_damage(found, expected)}; its {len(self.rows())} rows "
                    f"were written again{moved}"
                )
        self._written = len(content)

    def _read(self) -> bytes | None:
        """What the file holds; None: there is no regular file of this name."""
        is_file = self.path.is_file() and not self.path.is_symlink()
        return self.path.read_bytes() if is_file else None

    def _move_aside(self, found: bytes | None, content: bytes) -> str:
        """Keep the file if it holds anything that the rows do not."""
        if not found or content.startswith(found):
            return ""
        aside = first_free(self.path)
        self.path.replace(aside)
        return f", and what it held was moved to {aside.name}"


def append_once(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file, unless the same one is the last: a command was typed again.

    Raises:
        OSError: if it cannot be written.
    """
    line = json.dumps(dict(row)).encode() + b"\n"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines[-1:] == [line]:
        return
    is_cut = bool(lines) and not lines[-1].endswith(b"\n")  # by a full disk
    with path.open("ab") as file:
        file.write(b"\n" * is_cut + line)


def _damage(found: bytes | None, expected: bytes) -> str:
    if found is None:
        return "was deleted or is not a regular file"
    if expected.startswith(found):
        return f"was cut from {len(expected)} to {len(found)} bytes"
    pairs = zip(found.splitlines(), expected.splitlines(), strict=False)
    lines = [number for number, (ours, theirs) in enumerate(pairs, 1) if ours != theirs]
    return f"was changed{f' in line {lines[0]}' if lines else ''}"


def first_free(path: Path) -> Path:
    """`path` with the lowest number appended that no file or folder has: `x.1`, `x.2`, …"""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free
