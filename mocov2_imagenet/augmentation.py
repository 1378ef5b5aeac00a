"""The heavy view of mocov2_imagenet; its standard view T is `common/augment/imagenet.py`'s."""

from __future__ import annotations

from common.augment.base import Augmentation, RandomApply
from common.augment.grid_shuffle import GridShuffle
from common.augment.randaugment import RandAugment


def heavy_augmentation(num_ops: int, magnitude: int) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M) or, one time in ten, GridShuffle(4)."""
    return RandomApply(RandAugment(num_ops, magnitude), 0.9, otherwise=GridShuffle(4))
