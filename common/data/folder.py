"""The image files below a folder on disk, and what is not used of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Found:
    """The names of images below a folder, and of what is not used, by reason.

    A folder and an archive ask this class about each of their folders and files, so that both
    have the same images.

    Args:
        only: the folders directly below the folder that are used; None: all.

    Attributes:
        names: of images, relative to the folder, with "/".
        left_out: reason to names.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        self.only = only
        self.names: list[str] = []
        self.left_out: dict[str, list[str]] = {}

    def leave_out(self, reason: str, name: str) -> None:
        """Note what is not used, and why."""
        self.left_out.setdefault(reason, []).append(name)

    def enter(self, name: str) -> bool:
        """Whether the files of a folder are used."""
        if is_hidden(name):
            self.leave_out("hidden files and folders", name)
        elif self.only is not None and "/" not in name and name not in self.only:
            self.leave_out("classes that --classes does not list", name)
        else:
            return True
        return False

    def add(self, name: str, problem: Callable[[], str]) -> None:
        """Take a file if it is an image.

        Args:
            problem: says why an image file cannot be used, or "".
        """
        if is_hidden(name):
            if is_image(name):
                self.leave_out("hidden files and folders", name)
        elif not is_image(name):
            self.leave_out("files of other kinds", name)
        elif reason := problem():
            self.leave_out(reason, name)
        else:
            self.names.append(name)


def is_hidden(name: str) -> bool:
    """Whether the last part of a name begins with a dot."""
    return name.startswith(".", name.rfind("/") + 1)


def is_image(name: str) -> bool:
    """Whether a name has the suffix of an image, in any capitals."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def by_folder(name: str) -> str:
    """The key that sorts names as paths are: "a/x" before "a-b/x", although "-" precedes "/".

    No name has a zero character; lists of a path's parts would take far more memory.
    """
    return name.replace("/", "\0")


class Files(Sequence[Path]):
    """Paths in one block of memory.

    A million Python objects would be copied into every loader process, half a gigabyte each: a
    process that only reads an object changes its reference count.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.names[index])


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry is; False where that cannot be told, as of a link to itself."""
    try:
        return kind()
    except OSError:
        return False


class Folder:
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        return self.path.is_dir()

    def folders(self) -> list[str]:
        """The names of the folders directly in it, sorted."""
        return sorted(entry.name for entry in os.scandir(self.path) if _is(entry.is_dir))

    def folder(self, name: str) -> Folder:
        """A folder below it."""
        return Folder(self.path / name)

    def files(self, names: Sequence[str]) -> Files:
        """The files of these names."""
        return Files(self.path, names)

    def find(self, only: Collection[str] | None = None) -> Found:
        """All image files below the folder, sorted, and what was left out.

        An image file is a regular file, or a link to one, whose suffix is in `IMAGE_SUFFIXES` in
        any capitals. Links to folders are followed, except to one that contains the link.

        Args:
            only: as in `Found`.
        """
        found = Found(only)

        def visit(path: str, prefix: str, above: frozenset[str]) -> None:
            real = os.path.realpath(path)
            if real in above:
                found.leave_out("links to a folder that contains them", prefix[:-1])
                return
            try:
                with os.scandir(path) as scan:
                    entries = sorted(scan, key=lambda entry: entry.name)
            except OSError as error:
                found.leave_out(
                    f"folders that cannot be read: {error.strerror}", prefix[:-1] or "."
                )
                return
            for entry in entries:
                name = prefix + entry.name
                if not _is(entry.is_dir):
                    found.add(name, lambda entry=entry: problem(entry))
                elif found.enter(name):
                    visit(entry.path, f"{name}/", above | {real})

        def problem(entry: os.DirEntry[str]) -> str:
            return "" if _is(entry.is_file) else "not regular files, or broken links"

        visit(os.fspath(self.path), "", frozenset())
        found.names.sort(key=by_folder)
        return found


def list_images(folder: Path) -> list[Path]:
    """The paths of all image files below a folder, as `Folder.find` finds them."""
    return [folder / name for name in Folder(folder).find().names]
