"""The heavy view of simsiam_imagenet; its standard view T is `common/imagenet.py`'s."""

from __future__ import annotations

from common.image_ops import Augmentation
from common.photo_ops import GridShuffle, RandomApply
from common.randaugment import RandAugment


def heavy_augmentation(num_ops: int, magnitude: int) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M) or, one time in ten, GridShuffle(4)."""
    return RandomApply(RandAugment(num_ops, magnitude), 0.9, otherwise=GridShuffle(4))
