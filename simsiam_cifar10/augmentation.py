"""The heavy view of simsiam_cifar10; its standard view T is `common/cifar10.py`'s."""

from __future__ import annotations

from common.image_ops import Augmentation
from common.randaugment import RandAugment


def heavy_augmentation(num_ops: int, magnitude: int, translate_relative: bool) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M)."""
    return RandAugment(num_ops, magnitude, translate_relative)
