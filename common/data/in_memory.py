"""Image sets kept in memory as 8-bit tensors: CIFAR, a folder, generated shapes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from common.data.decoding import BrokenFile, decode, shown, square
from common.data.download import download, read_everywhere
from common.data.fingerprint import fingerprint, require_same_images
from common.data.listing import (
    Listing,
    find_split,
    first_of,
    has_folder,
    renumber,
    require_batch,
)
from common.data.shapes import CLASS_NAMES, shapes_split
from common.runtime.cores import usable_cores
from common.runtime.errors import UserError, require
from common.runtime.ranks import Ranks

Dataset = Literal["cifar10", "cifar100", "folder", "shapes"]
CIFAR = {"cifar10": ("CIFAR-10", CIFAR10), "cifar100": ("CIFAR-100", CIFAR100)}


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 `[N, 3, S, S]`; labels int64 `[N]` and class names, or none.

    `fingerprint` identifies the set (`common.data.fingerprint`).
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        """The set with images and labels on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


class Split(NamedTuple):
    """A training set, and a labelled test set where there is one to evaluate on."""

    train: ImageSet
    test: ImageSet | None

    def to(self, device: torch.device) -> Split:
        """Both sets on a device."""
        return Split(self.train.to(device), None if self.test is None else self.test.to(device))


def load_images(
    dataset: Dataset,
    data_root: str,
    image_size: int,
    seed: int,
    skip_broken: bool,
    at_least: int,
    ranks: Ranks,
) -> Split:
    """Load a data set whole.

    Args:
        dataset: "cifar10" or "cifar100" (see `load_cifar`), "folder" (see `load_folder`) or
            "shapes" (generated from `seed`).
        image_size: S, pixels; CIFAR has 32.
        skip_broken: leave out files that cannot be decoded instead of stopping.
        at_least: how many training images are needed: the batch.
        ranks: every rank loads for itself; the first one downloads and reports.

    Raises:
        UserError: if there is nothing to load, or too little, a file is broken, or the ranks found
            different images.
    """
    if dataset in CIFAR:
        split = load_cifar(dataset, data_root, image_size, ranks)
    elif dataset == "folder":
        split = load_folder(data_root, image_size, skip_broken, at_least, ranks)
    else:
        split = Split(*(_shapes_set(name, image_size, seed) for name in ("train", "val")))
    require_batch(len(split.train), at_least, dataset if dataset != "folder" else data_root)
    return split


def _shapes_set(split: str, image_size: int, seed: int) -> ImageSet:
    images, labels = shapes_split(split, image_size, seed)
    names = (f"shapes {split} {seed} {index}" for index in range(len(images)))
    return ImageSet(images, labels, CLASS_NAMES, fingerprint(names))


def load_cifar(dataset: Dataset, data_root: str, image_size: int, ranks: Ranks) -> Split:
    """torchvision's CIFAR-10, or CIFAR-100 with its 100 fine classes, downloaded when absent.

    Args:
        dataset: "cifar10" or "cifar100".
        data_root: holds torchvision's folder of the data set.

    Raises:
        UserError: if `image_size` is not 32, or there are no files and no network.
    """
    name, reader = CIFAR[dataset]
    if image_size != 32:
        raise UserError(f"{name} has 32-px images, not {image_size}; use another --dataset")
    download(reader, name, data_root, ranks)
    sets = []

    def read() -> list[CIFAR10]:
        return [reader(data_root, train=is_train) for is_train in (True, False)]

    for source in read_everywhere(read, name, data_root, ranks):
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        found = fingerprint(f"{label} {index}" for index, label in enumerate(source.targets))
        labels = torch.tensor(source.targets)
        sets.append(ImageSet(images, labels, tuple(source.classes), found))
    if ranks.is_main:
        print(f"Found {len(sets[0])} images of {len(source.classes)} classes in {data_root}.")
    return Split(*sets)


def load_folder(
    root: str, image_size: int, skip_broken: bool, at_least: int, ranks: Ranks
) -> Split:
    """Decode a folder or zip archive of images once, into memory.

    With `train/<class>/*` and `val/<class>/*` the set is labelled. Anything else counts as images
    without labels: those under `train/` if there is one, otherwise all under `root`.
    Images of another size are resized (shorter side, bicubic) and cut to the central square.

    Raises:
        UserError: if the folder is missing or empty, a file cannot be decoded (named), or the ranks
            found different images.
    """
    train = find_split(Path(root), "train", ranks, at_least)
    test = None
    reason = f"there is no train/ folder in {shown(train.folder)}"
    if not train.is_whole:
        reason = f"{shown(train.stray)} is in no class folder of {shown(train.folder)}"
        if train.class_names:
            test, reason = _find_test(Path(root), ranks)
    require(
        ranks.agree((train.is_whole, test is None)),
        f"not every process finds the same train/ and val/ in {shown(root)}; give every machine "
        "the same files",
    )
    labels = None
    if test is not None:
        labels = renumber(test.labels, test.class_names, train.class_names, str(test.folder))
    elif ranks.is_main:
        print(f"No labelled evaluation (kNN, linear): {reason}.")

    train_set = _decode(train, image_size, skip_broken, ranks)
    if train.is_whole:
        train_set = replace(train_set, labels=None, class_names=())
    require_same_images(train_set.fingerprint, root, ranks)
    if test is None:
        return Split(train_set, None)
    test = test._replace(labels=labels, class_names=train.class_names)
    test_set = _decode(test, image_size, skip_broken, ranks)
    require_same_images(test_set.fingerprint, root, ranks)
    return Split(train_set, test_set)


def _find_test(root: Path, ranks: Ranks) -> tuple[Listing | None, str]:
    """The labelled images of `val/`, or why there are none."""
    if not has_folder(root, "val"):
        return None, f"{shown(root)} has no val/<class>/ folders"
    test = find_split(root, "val", ranks)
    if test.stray:
        return None, f"{shown(test.stray)} is in no class folder of {shown(test.folder)}"
    return test, ""


def _decode(listing: Listing, image_size: int, skip_broken: bool, ranks: Ranks) -> ImageSet:
    """Decode the files of a split that can be decoded."""
    files = listing.files
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    broken: dict[int, str] = {}
    stopped = threading.Event()

    def read(index: int) -> None:
        try:
            images[index] = square(decode(files[index]), image_size)
        except BrokenFile as error:
            if not skip_broken:
                stopped.set()
                raise UserError(
                    f"{error}; restore the file or, for a new run, remove it, or leave such files "
                    "out with --skip-broken"
                ) from error
            broken[index] = listing.names[index]

    def read_all(some: range) -> int:
        for index in some:
            if stopped.is_set():
                break
            read(index)
        return len(some)

    threads = max(1, usable_cores() // ranks.per_machine)
    # One task for many files: a million tasks would take gigabytes.
    size = min(256, len(files) // (16 * threads) + 1)
    parts = [range(len(files))[start : start + size] for start in range(0, len(files), size)]
    bar = tqdm(desc="decoding", total=len(files), unit="image", disable=not ranks.is_main)
    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            for count in pool.map(read_all, parts):
                bar.update(count)
        except BaseException:  # an error, or Ctrl-C: do not decode the others
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    kept = [index for index in range(len(files)) if index not in broken]
    if not kept:
        raise UserError(
            f"none of the {len(files)} images in {shown(listing.folder)} can be decoded"
        )
    if broken and ranks.is_main:
        names = first_of([broken[index] for index in sorted(broken)])
        print(f"Left out {len(broken)} broken files of {shown(listing.folder)}: {names}")
    found = fingerprint([listing.names[index] for index in kept], [files[index] for index in kept])
    if broken:  # in place: a copy would take as much memory again
        for place, index in enumerate(kept):
            if place != index:
                images[place] = images[index]
        images = images[: len(kept)]
    labels = torch.tensor(listing.labels)[kept] if listing.class_names else None
    return ImageSet(images, labels, listing.class_names, found)
