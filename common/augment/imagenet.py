"""Photographs as every ImageNet experiment sees them: statistics, crops, standard view.

Workers cut the crops (`common/data/photographs.py`); the rest is batched on the training device.
"""

from __future__ import annotations

from torch import Tensor

from common.augment.base import Augmentation, Chain, RandomApply
from common.augment.blur import GaussianBlur
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.crop import RandomFlip
from common.augment.grid_shuffle import GridShuffle
from common.augment.normalise import normalise
from common.augment.randaugment import RandAugment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SCALE = (0.2, 1.0)  # area of a standard view's crop, as a share of the photograph's


def normalised(view: Tensor) -> Tensor:
    """A view, uint8 `[B, 3, H, W]`, as networks take it: float32, by ImageNet's statistics."""
    return normalise(view, MEAN, STD)


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
