"""Image sets kept in memory as 8-bit tensors: CIFAR-10, a folder, generated shapes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from common.data.decoding import BrokenFile, decode_square
from common.data.listing import label_by_folder, list_images, require_batch
from common.data.shapes import CLASS_NAMES, shapes
from common.runtime.cores import usable_cores
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks

Dataset = Literal["cifar10", "folder", "shapes"]


SHAPES_TRAIN, SHAPES_TEST = 6000, 1000


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 `[N, 3, S, S]`; labels int64 `[N]` and class names, or none."""

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

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
        dataset: "cifar10" (torchvision's files under `data_root`, downloaded when absent), "folder"
            (see `load_folder`) or "shapes" (generated from `seed`).
        image_size: S, pixels; CIFAR-10 has 32.
        skip_broken: leave out files that cannot be decoded instead of stopping.
        at_least: how many training images are needed: the batch.
        ranks: every rank loads for itself; the first one downloads and reports.

    Raises:
        UserError: if there is nothing to load, or too little, or a file is broken.
    """
    if dataset == "cifar10":
        split = load_cifar10(data_root, image_size, ranks)
    elif dataset == "folder":
        split = load_folder(data_root, image_size, skip_broken, at_least, ranks)
    else:
        train_images, train_labels = shapes(SHAPES_TRAIN, image_size, 2 * seed)
        test_images, test_labels = shapes(SHAPES_TEST, image_size, 2 * seed + 1)
        split = Split(
            ImageSet(train_images, train_labels, CLASS_NAMES),
            ImageSet(test_images, test_labels, CLASS_NAMES),
        )
    require_batch(len(split.train), at_least, dataset if dataset != "folder" else data_root)
    return split


def load_cifar10(data_root: str, image_size: int, ranks: Ranks) -> Split:
    """torchvision's CIFAR-10 under `data_root`, downloaded by rank 0 when absent."""
    if image_size != 32:
        raise UserError(f"CIFAR-10 has 32-px images, not {image_size}; use another --dataset")
    failure = None
    if ranks.is_main:
        try:
            CIFAR10(data_root, download=True)
        except (OSError, RuntimeError) as error:
            failure = error
    if ranks.any(failure is not None):
        reason = failure or "on the first rank"
        raise UserError(
            f"CIFAR-10 is not under {data_root} and could not be downloaded ({reason}); connect "
            "to the network, put cifar-10-python.tar.gz there, or try --dataset shapes"
        ) from failure
    sets = []
    for is_train in (True, False):
        source = CIFAR10(data_root, train=is_train)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        sets.append(ImageSet(images, torch.tensor(source.targets), tuple(source.classes)))
    return Split(*sets)


def load_folder(
    root: str, image_size: int, skip_broken: bool, at_least: int, ranks: Ranks
) -> Split:
    """Decode a folder of images once, into memory.

    With `train/<class>/*` and `val/<class>/*` the set is labelled. Anything else counts as images
    without labels: those under `train/` where there is one, all under `root` otherwise.
    Images of another size are resized (shorter side, bicubic) and cut to the central square.

    Raises:
        UserError: if the folder is missing or empty, or a file cannot be decoded (named).
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    files = list_images(train_folder)
    if not files:
        raise UserError(f"--data-root {root}: no images in {train_folder}")
    require_batch(len(files), at_least, root)
    labels, class_names = label_by_folder(train_folder, files)
    if train_folder == folder or not class_names:
        _say_unlabelled(
            ranks, f"the images of {train_folder} do not all lie in train/<class>/ folders"
        )
        return Split(ImageSet(_decode(files, image_size, skip_broken, ranks)[0]), None)

    test_folder = folder / "val"
    test_files = list_images(test_folder) if test_folder.is_dir() else []
    test_labels, test_names = label_by_folder(test_folder, test_files)
    unknown = sorted(set(test_names) - set(class_names))
    if unknown:
        raise UserError(
            f"{test_folder} has classes that {train_folder} has not: {', '.join(unknown)}"
        )
    images, kept = _decode(files, image_size, skip_broken, ranks)
    train = ImageSet(images, torch.tensor(labels)[kept], class_names)
    if not test_names:
        _say_unlabelled(ranks, f"{folder} has no val/<class>/ folders")
        return Split(train, None)
    images, kept = _decode(test_files, image_size, skip_broken, ranks)
    numbers = [class_names.index(test_names[label]) for label in test_labels]
    return Split(train, ImageSet(images, torch.tensor(numbers)[kept], class_names))


def _say_unlabelled(ranks: Ranks, reason: str) -> None:
    if ranks.is_main:
        print(f"No labelled evaluation (kNN, linear): {reason}.")


def _decode(
    files: Sequence[Path], image_size: int, skip_broken: bool, ranks: Ranks
) -> tuple[Tensor, list[int]]:
    """Decode files to uint8 `[N, 3, S, S]`, with the indices of those that could be."""
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    broken: list[int] = []

    def read(index: int) -> None:
        try:
            pixels = decode_square(files[index], image_size)
        except BrokenFile as error:
            if not skip_broken:
                raise UserError(
                    f"{error}; repair it or remove it, or leave such files out with --skip-broken"
                ) from error
            broken.append(index)
        else:
            images[index] = pixels

    with ThreadPoolExecutor(usable_cores()) as pool:
        done = pool.map(read, range(len(files)))
        try:
            for _ in tqdm(done, "decoding", len(files), unit="image", disable=not ranks.is_main):
                pass
        except BaseException:  # Ctrl-C too does not wait for the rest
            pool.shutdown(cancel_futures=True)
            raise
    if not broken:
        return images, list(range(len(files)))
    kept = sorted(set(range(len(files))) - set(broken))
    if not kept:
        raise UserError(f"none of the {len(files)} images in {files[0].parent} can be decoded")
    if ranks.is_main:
        names = ", ".join(str(files[index]) for index in sorted(broken)[:5])
        print(f"Left out {len(broken)} broken files: {names}{', …' if len(broken) > 5 else ''}")
    return images[kept], kept
