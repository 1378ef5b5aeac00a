"""The four views of simsiam_cifar10 at 32 px, on one core.

python benchmarks/views_32.py
"""

from __future__ import annotations

from functools import partial

import torch
import tyro

import other_libraries
from common.augment.cifar10 import standard_augmentation
from common.augment.normalise import normalise
from common.augment.randaugment import RandAugment
from common.runtime.memory import keep_freed_memory
from common.runtime.seeding import generator_for
from common.views import ViewMaker
from contest import Options, compare

BATCH, SIZE = 512, 32


def main(options: Options) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as every run on a CPU does
    images = other_libraries.photographs(BATCH, SIZE, SIZE)
    held = other_libraries.to_batch(images)  # as simsiam_cifar10 holds CIFAR-10 in memory
    heavy = partial(RandAugment, other_libraries.NUM_OPS, other_libraries.MAGNITUDE)

    def make(maker: ViewMaker) -> None:
        draws = maker.draw(BATCH, (SIZE, SIZE), generator_for("views", 0))
        for view in maker.make(held, draws):
            normalise(view, other_libraries.MEAN, other_libraries.STD)

    compare(
        "four views at 32 px, one core",
        {
            **other_libraries.others(images, SIZE, has_blur=False),
            **other_libraries.ours(make, partial(standard_augmentation, SIZE), heavy),
        },
        options,
        items=BATCH,
        core_time=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
