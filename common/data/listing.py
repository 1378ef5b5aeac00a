"""Which image files a folder holds, and the classes that its folders name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.runtime.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}


def require_batch(count: int, at_least: int, source: str) -> None:
    """Refuse a batch that the set cannot fill."""
    if count < at_least:
        raise UserError(
            f"a batch of {at_least} does not fit a set of {count} images ({source}); "
            f"use --batch-size {count} or less"
        )


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted; links are followed, hidden files and folders not."""
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(real)
        found += [
            Path(parent, name)
            for name in files
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def label_by_folder(folder: Path, files: Sequence[Path]) -> tuple[list[int], tuple[str, ...]]:
    """Number the first folder below `folder` that each file lies in.

    Returns:
        A number for each file, and the class names; both empty if a file lies in no such folder.
    """
    parts = [path.relative_to(folder).parts for path in files]
    if any(len(part) < 2 for part in parts):
        return [], ()
    class_names = tuple(sorted({part[0] for part in parts}))
    number = {name: index for index, name in enumerate(class_names)}
    return [number[part[0]] for part in parts], class_names


class Files(Sequence[Path]):
    """Paths in one block of memory.

    A million Python objects would be copied into every loader worker, half a gigabyte each: a
    worker that merely looks at one changes its count of references.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.names = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(self.names[index]))
