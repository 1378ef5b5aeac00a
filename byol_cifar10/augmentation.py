"""The heavy view of byol_cifar10; its standard view T is `common/augment/cifar10.py`'s."""

from __future__ import annotations

from common.augment.base import Augmentation
from common.augment.randaugment import RandAugment


def heavy_augmentation(num_ops: int, magnitude: int, translate_relative: bool) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M)."""
    return RandAugment(num_ops, magnitude, translate_relative)
