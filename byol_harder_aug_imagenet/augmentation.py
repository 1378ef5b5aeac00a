"""The views of byol_harder_aug_imagenet.

T begins with RandAugment on the whole photograph, before the crop, so the loader workers apply it.
"""

from __future__ import annotations

from common.augment.base import Augmentation, Chain, RandomApply
from common.augment.blur import GaussianBlur
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.crop import RandomResizedCropFlip
from common.augment.grid_shuffle import GridShuffle
from common.augment.imagenet import CROP_SCALE, standard_augmentation
from common.augment.randaugment import RandAugment

__all__ = ["CROP_SCALE", "heavy_augmentation", "standard_augmentation", "whole_augmentation"]


def whole_augmentation(num_ops: int, magnitude: int) -> RandAugment | None:
    """T's first part, on the whole photograph: RandAugment(N, M); none for N = 0."""
    return RandAugment(num_ops, magnitude) if num_ops else None


def heavy_augmentation(
    num_ops: int, magnitude: int, image_size: int, crops_again: bool
) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M), then harder augmentation.

    Args:
        crops_again: whether there is more than RandAugment: a second crop with flip, colour jitter,
            grey and blur, and GridShuffle(4). Table 1's BYOL does without.
    """
    randaugment = RandAugment(num_ops, magnitude)
    if not crops_again:
        return randaugment
    return Chain(
        randaugment,
        RandomResizedCropFlip(image_size, scale=CROP_SCALE),
        ColorJitter(0.5, 0.5, 0.5, 0.1, probability=0.8),
        RandomGrey(probability=0.2),
        GaussianBlur(sigma=(0.1, 2.0), probability=0.5),
        RandomApply(GridShuffle(4), 0.1),
    )
