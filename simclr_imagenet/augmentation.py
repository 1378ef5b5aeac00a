"""The views of simclr_imagenet: T's colours change twice as much as other experiments'."""

from __future__ import annotations

from common.augment.base import Augmentation, Chain
from common.augment.blur import GaussianBlur
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.crop import RandomFlip
from common.augment.imagenet import heavy_augmentation

__all__ = ["CROP_SCALE", "heavy_augmentation", "standard_augmentation"]

CROP_SCALE = (0.08, 1.0)  # area of a standard view's crop, as a share of the photograph's


def standard_augmentation() -> Augmentation:
    """T on a crop: flip, colour jitter, grey, blur."""
    return Chain(
        RandomFlip(),
        ColorJitter(0.8, 0.8, 0.8, 0.2, probability=0.8),
        RandomGrey(probability=0.2),
        GaussianBlur(sigma=(0.1, 2.0), probability=0.5),
    )
