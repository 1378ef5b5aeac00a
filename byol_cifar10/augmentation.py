"""The views of byol_cifar10: T and T̂ of `common/augment/cifar10.py`.

Replace either one by a function of your own to change this experiment alone.
"""

from __future__ import annotations

from common.augment.cifar10 import heavy_augmentation, standard_augmentation

__all__ = ["heavy_augmentation", "standard_augmentation"]
