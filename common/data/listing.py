"""Which image files a folder holds, which it does not use, and the classes of its folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.decoding import shown
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
EVALUATION_SPLITS = ("val", "valid", "validation", "test")
NAMED = 3  # files that a message names; it counts the others

LeftOut = dict[str, list[str]]  # reason to names


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


class Listing(NamedTuple):
    """The image files of a folder, and the number of each one's class.

    Where an image is in no class folder (`stray` names the first), there are no labels.
    """

    folder: Path
    names: list[str]  # relative to the folder, sorted
    labels: list[int]
    class_names: tuple[str, ...]
    stray: str

    @property
    def files(self) -> Files:
        """Their paths."""
        return Files(self.folder, self.names)


def require_batch(count: int, at_least: int, source: str) -> None:
    """Refuse a batch that is larger than the set."""
    if count < at_least:
        raise UserError(
            f"a batch of {at_least} does not fit a set of {count} images ({source}); "
            f"use --batch-size {count} or less"
        )


def first_of(names: Sequence[str]) -> str:
    """The first names for a message, and a sign that there are more."""
    return ", ".join(map(shown, names[:NAMED])) + (", …" if len(names) > NAMED else "")


def find_split(root: Path, split: str, ranks: Ranks, at_least: int = 1) -> Listing:
    """List a split of an image folder, and print once what was found and what was left out.

    Args:
        root: holds `<split>/`; where it has no `train/`, all its images are the training split.
        split: "train" or "val".
        at_least: how many images are needed.

    Raises:
        UserError: if the folder is missing or has too few images, or if its folders look like
            those of another layout, whose validation images would be trained on.
    """
    folder = _split_folder(root, split)
    names, left_out = walk(folder)
    reasons = [f"{len(some)} {reason} ({first_of(some)})" for reason, some in left_out.items()]
    if not names:
        also = f", but {'; '.join(reasons)}" if reasons else ""
        raise UserError(f"--data-root {shown(root)}: no images in {shown(folder)}{also}")
    if folder == root:
        _refuse_splits_further_down(root, names)
    require_batch(len(names), at_least, shown(folder))
    listing = Listing(folder, names, *label_by_folder(names))
    if ranks.is_main:
        kind = "without classes"
        if listing.class_names:
            kind = f"of {len(listing.class_names)} class{'es' * (len(listing.class_names) > 1)}"
        print(f"Found {len(names)} images {kind} in {shown(folder)}.")
        for reason in reasons:
            print(f"  Not used: {reason}.")
    return listing


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise UserError(f"--data-root {shown(root)}: no such folder")
    if (root / split).is_dir():
        return root / split
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for name in folders:
        if name.lower() == split:
            raise UserError(f"{shown(root)} holds {shown(name)}/; rename it to {split}/")
    if split != "train":
        raise UserError(f"{shown(root)} has no {split}/ folder")
    for name in folders:
        if name.lower() in EVALUATION_SPLITS:
            raise UserError(
                f"{shown(root)} holds {shown(name)}/ but no train/, so that these images would be "
                "trained on; name the folder of training images train/, or give --data-root a "
                "folder that holds nothing else"
            )
    return root


def _refuse_splits_further_down(root: Path, names: Sequence[str]) -> None:
    train, other = set(), set()
    for folder in {name.rpartition("/")[0] for name in names}:
        parts = folder.split("/")
        for depth, part in enumerate(parts):
            where = train if part.lower() == "train" else other
            if where is train or part.lower() in EVALUATION_SPLITS:
                where.add("/".join(parts[:depth]))
    for parent in sorted(train & other):
        raise UserError(
            f"{shown(root)} holds the splits in {shown(parent)}/; give "
            f"--data-root {shown(root / parent)}"
        )


def walk(folder: Path) -> tuple[list[str], LeftOut]:
    """All image files below a folder, and what was left out; both in a fixed order.

    An image file is a regular file, or a link to one, whose suffix is in `IMAGE_SUFFIXES` in any
    capitals. Links to folders are followed, except to one that contains the link.

    Returns:
        Names relative to the folder, with "/", sorted folder by folder; and by reason the names
        of what is not an image or cannot be read.
    """
    found: list[str] = []
    left_out: LeftOut = {}

    def leave_out(reason: str, name: str) -> None:
        left_out.setdefault(reason, []).append(name)

    def visit(path: str, prefix: str, above: frozenset[str]) -> None:
        real = os.path.realpath(path)
        if real in above:
            leave_out("links to a folder that contains them", prefix[:-1])
            return
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            leave_out(f"folders that cannot be read: {error.strerror}", prefix[:-1])
            return
        for entry in entries:
            name = prefix + entry.name
            is_folder = entry.is_dir()
            if entry.name.startswith("."):
                if is_folder or entry.name.lower().endswith(IMAGE_SUFFIXES):
                    leave_out("hidden files and folders", name)
            elif is_folder:
                visit(entry.path, f"{name}/", above | {real})
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                leave_out("files of other kinds", name)
            elif not entry.is_file():
                leave_out("not regular files, or broken links", name)
            else:
                found.append(name)

    visit(os.fspath(folder), "", frozenset())
    return sorted(found, key=lambda name: name.split("/")), left_out


def list_images(folder: Path) -> list[Path]:
    """The paths of all image files below a folder, as `walk` finds them."""
    return [folder / name for name in walk(folder)[0]]


def label_by_folder(names: Sequence[str]) -> tuple[list[int], tuple[str, ...], str]:
    """Number the first folder of each relative name.

    Returns:
        A number for each name, the class names, and "". If a name has no folder: nothing, no
        class names, and that name.
    """
    classes = []
    for name in names:
        first, has_folder, _ = name.partition("/")
        if not has_folder:
            return [], (), name
        classes.append(first)
    class_names = tuple(sorted(set(classes)))
    number = {name: index for index, name in enumerate(class_names)}
    return [number[name] for name in classes], class_names, ""


def renumber(
    labels: Sequence[int], class_names: Sequence[str], known: Sequence[str], source: str
) -> list[int]:
    """Labels of an evaluation set by the numbers that its classes have in the training set.

    Args:
        known: the training set's classes.
        source: of the evaluation set, for the message.

    Raises:
        UserError: if the training set lacks a class.
    """
    number = {name: index for index, name in enumerate(known)}
    unknown = sorted(set(class_names) - set(known))
    if unknown:
        raise UserError(
            f"{shown(source)} has {len(unknown)} classes that the training images do not have: "
            f"{first_of(unknown)}"
        )
    return [number[class_names[label]] for label in labels]
