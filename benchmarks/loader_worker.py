"""CPU time of a loader worker for a photograph; the rest runs on the training device.

python benchmarks/loader_worker.py --data-root DIR

DIR holds JPEG photographs, in any folders. Without it, generated ones of 500 × 375 are used.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

import byol_harder_aug_imagenet.augmentation
import other_libraries
from common.augment.imagenet import CROP_SCALE
from common.data.folder import list_images
from common.data.photographs import RandomCrops, stack
from common.runtime.memory import keep_freed_memory
from contest import Options, compare

COUNT, SIZE = 64, 224


@dataclass(frozen=True)
class LoaderOptions(Options):
    data_root: str = ""  # JPEG photographs; default: generated ones


def main(options: LoaderOptions) -> None:
    torch.set_num_threads(1)  # as a DataLoader's workers have
    keep_freed_memory()  # as ours do
    with tempfile.TemporaryDirectory() as folder:
        root = options.data_root
        if not root:
            root = folder
            for index, image in enumerate(other_libraries.photographs(COUNT, 375, 500)):
                Image.fromarray(image).save(Path(folder) / f"{index}.jpg", quality=90)
        files = list_images(Path(root))[:COUNT]
        authors = other_libraries.pillow(SIZE, has_blur=True)
        whole = byol_harder_aug_imagenet.augmentation.whole_augmentation(2, 9)
        simsiam = RandomCrops(files, 2, SIZE, CROP_SCALE, 0)
        byol = RandomCrops(files, 2, SIZE, CROP_SCALE, 0, whole)

        def by_pillow() -> None:
            for file in files:
                authors([np.asarray(Image.open(file).convert("RGB"))])

        def load(crops: RandomCrops) -> None:
            stack([crops[0, index] for index in range(len(files))])

        compare(
            "a loader worker: decode, and views of 224 px",
            {
                "Pillow: decode, four views": by_pillow,
                "byol_harder_aug_imagenet, which does more": lambda: load(byol),
                "simsiam_imagenet": lambda: load(simsiam),
            },
            options,
            items=len(files),
            core_time=True,
        )


if __name__ == "__main__":
    main(tyro.cli(LoaderOptions))
