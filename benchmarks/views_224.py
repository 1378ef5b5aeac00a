"""The four views of simsiam_imagenet at 224 px from decoded photographs of 500 × 375, on one core.

python benchmarks/views_224.py
"""

from __future__ import annotations

from functools import partial

import torch
import tyro

import other_libraries
from common.augment.imagenet import CROP_SCALE, normalised, standard_augmentation
from common.data.photographs import RandomCrops, stack
from common.runtime.memory import keep_freed_memory
from common.runtime.seeding import generator_for
from common.views import ViewMaker
from contest import Options, compare
from simsiam_imagenet.augmentation import heavy_augmentation

BATCH, SIZE = 64, 224


def main(options: Options) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run on a CPU does
    images = other_libraries.photographs(BATCH, 375, 500)
    decoded = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    crops = RandomCrops(decoded, 2, SIZE, CROP_SCALE, 0)
    heavy = partial(heavy_augmentation, other_libraries.NUM_OPS, other_libraries.MAGNITUDE)

    def make(maker: ViewMaker) -> None:
        first, second = stack([crops[0, index] for index in range(BATCH)]).crops
        draws = maker.draw(BATCH, (SIZE, SIZE), generator_for("views", 0))
        for view in maker.make(first.contiguous(), draws, second.contiguous()):
            normalised(view)

    compare(
        "four views at 224 px from 500 × 375, one core",
        {
            **other_libraries.others(images, SIZE, has_blur=True),
            **other_libraries.ours(make, standard_augmentation, heavy),
        },
        options,
        items=BATCH,
        core_time=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
