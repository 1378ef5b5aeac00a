"""The views of barlowtwins_imagenet: T and T̂ of `common/augment/imagenet.py`.

Replace either one by a function of your own to change this experiment alone.
"""

from __future__ import annotations

from common.augment.imagenet import CROP_SCALE, heavy_augmentation, standard_augmentation

__all__ = ["CROP_SCALE", "heavy_augmentation", "standard_augmentation"]
