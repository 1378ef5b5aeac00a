"""STL-10: photographs of 96 px in a few files; most of them have no labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import STL10

from common.data.decoding import BrokenFile
from common.data.download import download, read_everywhere
from common.runtime.errors import require
from common.runtime.ranks import Ranks

SIDE = 96  # pixels
IMAGE_BYTES = 3 * SIDE**2
# The images of each split; those after the first file have no labels.
FILES = {"pretraining": ("train", "unlabeled"), "train": ("train",), "val": ("test",)}


class BinaryImages(Sequence[Tensor]):
    """The images of binary files one after another, each uint8 `[3, 96, 96]`, read on access.

    So no process keeps a copy of their 3 GB: all share what the system has cached of the files.

    Raises:
        OSError: if a file is missing.
        BrokenFile: on access, if an image cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.count = 0
        self.files: list[tuple[int, Path]] = []  # with the index of its first image; the last first
        for path in paths:
            self.files.insert(0, (self.count, path))
            self.count += path.stat().st_size // IMAGE_BYTES

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        index = range(self.count)[index]
        first, path = next(file for file in self.files if file[0] <= index)
        return _read(path, index - first)


def _read(path: Path, index: int) -> Tensor:
    try:
        pixels = np.fromfile(path, np.uint8, IMAGE_BYTES, offset=index * IMAGE_BYTES)
    except OSError as error:
        raise BrokenFile(f"{path} cannot be read ({error})") from error
    if len(pixels) < IMAGE_BYTES:
        raise BrokenFile(f"{path} has no image {index}: it is shorter than before")
    # Channels, columns, rows; in memory the channels come last, as those of a decoded photograph.
    rows_first = torch.from_numpy(pixels).view(3, SIDE, SIDE).permute(2, 1, 0).contiguous()
    return rows_first.permute(2, 0, 1)


def find_stl10(
    data_root: str, image_size: int, split: str, ranks: Ranks
) -> tuple[BinaryImages, list[int], tuple[str, ...]]:
    """torchvision's STL-10 under `data_root`, downloaded by rank 0 when absent.

    Args:
        image_size: of the views, pixels, at most 96.
        split: "pretraining" (5,000 labelled images, then 100,000 without labels), "train" (the
            5,000) or "val" (the 8,000 test images).

    Returns:
        Images, the labels 0..9 of the first of them (the others have none), and the classes' names.

    Raises:
        UserError: if the images are smaller than the views, or cannot be downloaded or found.
    """
    require(
        image_size <= SIDE,
        f"STL-10 has {SIDE}-px images, smaller than views of {image_size} px; use --image-size "
        f"{SIDE} or less",
    )
    download(STL10, "STL-10", data_root, ranks)
    folder = Path(data_root, STL10.base_folder)
    files = FILES[split]

    def read() -> tuple[BinaryImages, np.ndarray, tuple[str, ...]]:
        images = BinaryImages([folder / f"{name}_X.bin" for name in files])
        labels = np.fromfile(folder / f"{files[0]}_y.bin", np.uint8)
        return images, labels, tuple((folder / STL10.class_names_file).read_text().splitlines())

    images, labels, class_names = read_everywhere(read, "STL-10", folder, ranks)
    if ranks.is_main:
        part = f", {len(labels)} of them" * (len(labels) < len(images))
        print(f"Found {len(images)} images{part} of {len(class_names)} classes in {folder}.")
    return images, (labels.astype(int) - 1).tolist(), class_names
