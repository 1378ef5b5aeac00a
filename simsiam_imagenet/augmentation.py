"""The views of simsiam_imagenet: crops are cut by the loader's workers, the rest is batched."""

from __future__ import annotations

from common.image_ops import Augmentation, Chain, ColorJitter, RandomGrey
from common.photo_ops import GaussianBlur, GridShuffle, RandomApply, RandomFlip
from common.randaugment import RandAugment

CROP_SCALE = (0.2, 1.0)  # area of a standard view's crop, as a share of the photograph's


def standard_augmentation() -> Augmentation:
    """T on a crop: flip, colour jitter, grey, blur."""
    return Chain(
        RandomFlip(),
        ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        RandomGrey(probability=0.2),
        GaussianBlur(sigma=(0.1, 2.0), probability=0.5),
    )


def heavy_augmentation(num_ops: int, magnitude: int) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M) or, one time in ten, GridShuffle(4)."""
    return RandomApply(RandAugment(num_ops, magnitude), 0.9, otherwise=GridShuffle(4))
