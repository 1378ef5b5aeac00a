"""CIFAR-10 as every experiment on it sees it: size, statistics, standard view, evaluation's views.

Other images of 32 px (a folder, shapes) are treated alike.
"""

from __future__ import annotations

from torch import Tensor

from common.augment.base import Augmentation, Chain
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.crop import RandomResizedCropFlip, resize_centre_crop
from common.augment.normalise import normalise
from common.augment.randaugment import RandAugment

IMAGE_SIZE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def normalised(view: Tensor) -> Tensor:
    """A view, uint8 `[B, 3, H, W]`, as networks take it: float32, by CIFAR-10's statistics."""
    return normalise(view, MEAN, STD)


def standard_augmentation(image_size: int = IMAGE_SIZE) -> Augmentation:
    """T: crop of 20 to 100 % of the area, flip, colour jitter, grey."""
    return Chain(
        RandomResizedCropFlip(image_size, scale=(0.2, 1.0)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        RandomGrey(probability=0.2),
    )


def heavy_augmentation(num_ops: int, magnitude: int, translate_relative: bool) -> Augmentation:
    """T̂, applied to a standard view: RandAugment(N, M)."""
    return RandAugment(num_ops, magnitude, translate_relative)


def probe_augmentation() -> Augmentation:
    """The training view of the linear evaluation: crop of 80 to 100 %, flip."""
    return RandomResizedCropFlip(IMAGE_SIZE, scale=(0.8, 1.0), kernel="bicubic")


def centre_view(images: Tensor) -> Tensor:
    """Resize to 36 px, bicubic, and the centre of 32: uint8 `[B, 3, H, W]` to `[B, 3, 32, 32]`."""
    return resize_centre_crop(images, 36, IMAGE_SIZE, "bicubic")
