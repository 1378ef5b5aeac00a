"""Which images a split of a data set has, on disk or in an archive, and their classes."""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.data.archive import Archive, ArchiveFolder, Entries
from common.data.decoding import shown
from common.data.folder import Files, Folder
from common.runtime.errors import UserError, require
from common.runtime.ranks import Ranks

EVALUATION_SPLITS = ("val", "valid", "validation", "test")
NAMED = 3  # files that a message names; it counts the others


class Listing(NamedTuple):
    """The image files of a split, and the number of each one's class.

    Where an image is in no class folder (`stray` names the first), there are no labels.
    """

    folder: Path
    is_whole: bool  # the folder is the data set's own, not its train/ or val/
    files: Files | Entries
    names: list[str]  # relative to the folder, sorted
    labels: list[int]
    class_names: tuple[str, ...]
    stray: str


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


def open_root(root: Path) -> Folder | ArchiveFolder:
    """The folder of images that `--data-root` names.

    It may be a zip archive, or a folder in one, such as `X.zip/a`. Where one folder at the top of
    an archive has all of its images, it is that folder: most programs pack a folder with its name.

    Raises:
        UserError: if it cannot be read, or a file is not a complete zip archive.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.scandir(root).close()
    except OSError as error:
        raise UserError(f"--data-root {shown(root)} cannot be read ({error.strerror})") from error
    for path in (root, *root.parents):
        if path.is_file():
            archive = Archive(path)
            if root != path:
                return archive.folder(root.relative_to(path).as_posix())
            top = archive.top()
            return archive.folder("" if top.lower() in ("train", *EVALUATION_SPLITS) else top)
    return Folder(root)


def has_folder(root: Path, name: str) -> bool:
    """Whether `--data-root` has a folder of this name, in any capitals."""
    opened = open_root(root)
    return opened.exists() and name in (folder.lower() for folder in opened.folders())


def find_split(
    root: Path, split: str, ranks: Ranks, at_least: int = 1, classes: str = ""
) -> Listing:
    """List a split of an image folder, and print once what was found and what was left out.

    Args:
        root: a folder or an archive, as for `open_root`. It holds `<split>/`; where it has no
            `train/`, all its images are the training split.
        split: "train" or "val".
        at_least: how many images are needed.
        classes: a file of the classes that are used, as for `read_classes`; "": all.

    Raises:
        UserError: if the folder is missing or has too few images, if its folders look like those
            of another layout, whose validation images would count as training images, or if it does
            not have the classes.
    """
    only = read_classes(Path(classes)) if classes else None
    opened = open_root(root)
    folder = _split_folder(opened, split)
    found = folder.find(only)
    names, where = found.names, shown(folder.path)
    listing = Listing(
        folder.path, folder is opened, folder.files(names), names, *label_by_folder(names)
    )
    reasons = [f"{len(some)} {why} ({first_of(some)})" for why, some in found.left_out.items()]
    if only is not None:
        require(
            not listing.stray,
            f"--classes {shown(classes)} needs images in class folders, and {where} has "
            f"{shown(listing.stray)}",
        )
        missing = sorted(only.difference(listing.class_names))
        require(
            not missing,
            f"{where} has no images of {len(missing)} of the classes in {shown(classes)}: "
            f"{first_of(missing)}",
        )
    if not names:
        also = f", but {'; '.join(reasons)}" if reasons else ""
        raise UserError(f"--data-root {shown(root)}: no images in {where}{also}")
    if listing.is_whole:
        _refuse_splits_further_down(folder.path, names)
    require_batch(len(names), at_least, where)
    if ranks.is_main:
        kind = "without classes"
        if listing.class_names:
            kind = f"of {len(listing.class_names)} class{'es' * (len(listing.class_names) > 1)}"
        print(f"Found {len(names)} images {kind} in {where}.")
        for reason in reasons:
            print(f"  Not used: {reason}.")
    return listing


def read_classes(path: Path) -> frozenset[str]:
    """The names of class folders in a text file, one a line.

    Empty lines do not count, nor what follows a "#" at the start of a line or after a space.

    Raises:
        UserError: if the file cannot be read, names no class, or one twice.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"--classes {shown(path)} cannot be read ({error.strerror})") from error
    lines = [
        re.split(r"(?:^|\s)#", line, maxsplit=1)[0] for line in os.fsdecode(content).split("\n")
    ]
    names = [line.strip() for line in lines if line.strip()]
    require(bool(names), f"--classes {shown(path)} names no class; write one a line")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    require(not twice, f"--classes {shown(path)} names a class twice: {first_of(twice)}")
    return frozenset(names)


def _split_folder(root: Folder | ArchiveFolder, split: str) -> Folder | ArchiveFolder:
    where = shown(root.path)
    require(root.exists(), f"--data-root {where}: no such folder")
    folders = root.folders()
    if split in folders:
        return root.folder(split)
    for name in folders:
        if name.lower() == split:
            raise UserError(f"{where} holds {shown(name)}/; rename it to {split}/")
    if split != "train":
        raise UserError(f"{where} has no {split}/ folder")
    for name in folders:
        if name.lower() in EVALUATION_SPLITS:
            raise UserError(
                f"{where} holds {shown(name)}/ but no train/, so that these images would count as "
                "training images; name the folder of training images train/, or give --data-root a "
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
