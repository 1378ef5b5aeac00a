"""A run folder belongs to one process at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from common.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None

NAME = ".lock"


class FolderLock:
    """Makes a folder where it is missing, and locks it until `release` or the process's end.

    Args:
        name: of the lock's file; locks of different names are held together.

    Raises:
        OSError: if the folder or a file in it cannot be made.
        UserError: if another process uses the folder.
    """

    def __init__(self, folder: Path, name: str = NAME) -> None:
        self.folder = folder
        self.name = name
        self._file: IO[str] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._folder_status = folder.stat()
        if fcntl is not None:
            self._file = self._lock()

    def _lock(self) -> IO[str]:
        path = self.folder / self.name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is not a regular file; delete it, or choose another --run-dir")
        file = path.open("a")
        try:
            # Not flock: loader workers would inherit that lock, and may outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is using {self.folder}; wait for its end, or choose another "
                "--run-dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        return file

    def is_folder_there(self) -> bool:
        """Whether the folder's name still leads to the folder that was locked."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._file is not None:
                mine, there = os.fstat(self._file.fileno()), (self.folder / self.name).lstat()
            else:
                mine, there = self._folder_status, self.folder.stat()
            return os.path.samestat(mine, there)
        return False

    def is_same_folder(self) -> bool:
        """Whether only the lock was deleted, and the folder is the one that was locked."""
        return os.path.samestat(self._folder_status, self.folder.stat())

    def release(self) -> None:
        """Let other processes use the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None
