"""The views of simsiam_cifar10."""

from __future__ import annotations

from common.image_ops import Augmentation, Chain, ColorJitter, RandomGrey, RandomResizedCropFlip
from common.randaugment import RandAugment


def standard_augmentation(image_size: int) -> Augmentation:
    """T: crop of 20 to 100 % of the area, flip, colour jitter, grey."""
    return Chain(
        RandomResizedCropFlip(image_size, scale=(0.2, 1.0)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        RandomGrey(probability=0.2),
    )


def heavy_augmentation(num_ops: int, magnitude: int) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M)."""
    return RandAugment(num_ops, magnitude)


def probe_augmentation(image_size: int) -> Augmentation:
    """The training view of the linear evaluation: crop of 80 to 100 %, flip."""
    return RandomResizedCropFlip(image_size, scale=(0.8, 1.0), kernel="bicubic")
