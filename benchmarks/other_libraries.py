"""The four views v, v', v̂, v̂' of simsiam_cifar10 and simsiam_imagenet by other libraries.

Each maker turns a list of 8-bit RGB images, arrays `[H, W, 3]`, into normalised float tensors. T is
crop, flip, ColorJitter, grey and, for photographs, blur. T̂ is RandAugment(2, 9).

- Pillow: image by image, as the authors' loader, with the paper's sixteen operations.
- albumentations: image by image, by OpenCV, with its nearest equivalents of the sixteen.
- kornia: in batches, with its own operations.
- torchvision v2: in batches, with its own operations and one set of random parameters for a whole
  batch: less work than the others.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import albumentations as A
import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from common.augment.base import Augmentation
from common.runtime.compiler import require_compiler
from common.views import ViewMaker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import pillow_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_OPS, MAGNITUDE = 2, 9
SCALE = (0.2, 1.0)

Maker = Callable[[Sequence[np.ndarray]], object]


def photographs(count: int, height: int, width: int) -> list[np.ndarray]:
    """Generated photographs, 8-bit `[height, width, 3]`."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        picture = pillow_reference.photograph((height, width), generator)
        made.append(picture.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    return made


def four(standard: Callable, heavy: Callable, finish: Callable) -> Callable:
    """A function that maps an image, or a batch, to its four views."""

    def make(image: object) -> list[object]:
        views = []
        for _ in range(2):
            view = standard(image)
            views += [finish(view), finish(heavy(view))]
        return views

    return make


def pillow(size: int, has_blur: bool) -> Maker:
    standard = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
        ]
    )
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def blurred(image: Image.Image) -> Image.Image:
        view = standard(image)
        if has_blur and random.random() < 0.5:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return view

    def heavy(image: Image.Image) -> Image.Image:
        for name in random.choices(list(pillow_reference.OPERATIONS), k=NUM_OPS):
            value = pillow_reference.strength(name, MAGNITUDE)
            if pillow_reference.STRENGTHS[name].signed:
                value *= random.choice((-1, 1))
            centre = (random.random() * size, random.random() * size)
            further = (centre,) if name == "Cutout" else ()
            image = pillow_reference.OPERATIONS[name](image, value, *further)
        return image

    make = four(blurred, heavy, finish)
    return lambda images: [make(Image.fromarray(image)) for image in images]


def albumentations(size: int, has_blur: bool) -> Maker:
    share = MAGNITUDE / 30
    factor = 0.1 + share * 1.8

    def shift(x: float, y: float) -> A.BasicTransform:
        return A.Affine(translate_percent={"x": (-x, x), "y": (-y, y)}, interpolation=0, p=1)

    def jitter(**only: tuple[float, float]) -> A.BasicTransform:
        none = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
        return A.ColorJitter(**{**none, **only}, p=1)

    moved, sheared = 100 * share / size, 180 / np.pi * 0.3 * share
    operations = [
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.InvertImg(p=1),
        A.Affine(rotate=(-30 * share, 30 * share), interpolation=0, p=1),
        A.Posterize(num_bits=1, p=1),
        A.Solarize(threshold_range=(share, share), p=1),
        A.Sequential([A.RGBShift((33, 33), (33, 33), (33, 33), p=1), A.Solarize(p=1)], p=1),
        jitter(saturation=(factor, factor)),
        jitter(contrast=(factor, factor)),
        jitter(brightness=(factor, factor)),
        A.Sharpen(p=1),
        A.Affine(shear={"x": (-sheared, sheared), "y": (0, 0)}, interpolation=0, p=1),
        A.Affine(shear={"x": (0, 0), "y": (-sheared, sheared)}, interpolation=0, p=1),
        A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=(int(40 * share), int(40 * share)),
            hole_width_range=(int(40 * share), int(40 * share)),
            p=1,
        ),
        shift(moved, 0),
        shift(0, moved),
    ]
    blur = [A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5)] if has_blur else []
    standard = A.Compose(
        [
            A.RandomResizedCrop(size=(size, size), scale=SCALE),
            A.HorizontalFlip(),
            A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
            A.ToGray(p=0.2),
            *blur,
        ]
    )
    heavy = A.Compose([A.SomeOf(operations, n=NUM_OPS, replace=True, p=1)])
    finish = A.Compose([A.Normalize(MEAN, STD), A.ToTensorV2()])
    make = four(
        lambda image: standard(image=image)["image"],
        lambda image: heavy(image=image)["image"],
        lambda image: finish(image=image)["image"],
    )
    return lambda images: [make(image) for image in images]


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 `[B, 3, H, W]`."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def torchvision_v2(size: int, has_blur: bool) -> Maker:
    blur = [v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], 0.5)] if has_blur else []
    standard = v2.Compose(
        [
            v2.RandomResizedCrop(size, SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            *blur,
        ]
    )
    heavy = v2.RandAugment(NUM_OPS, MAGNITUDE, num_magnitude_bins=31)
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    make = four(standard, heavy, finish)
    return lambda images: make(to_batch(images))


def kornia(size: int, has_blur: bool) -> Maker:
    blur = [K.RandomGaussianBlur((17, 17), (0.1, 2.0), p=0.5)] if has_blur else []
    standard = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), SCALE),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        *blur,
        data_keys=["input"],
    )
    heavy = K.auto.RandAugment(n=NUM_OPS, m=MAGNITUDE)
    normalise = K.Normalize(torch.tensor(MEAN), torch.tensor(STD))
    make = four(standard, heavy, normalise)
    return lambda images: make(to_batch(images).to(torch.float32).div_(255))


def others(
    images: Sequence[np.ndarray], size: int, has_blur: bool
) -> dict[str, Callable[[], object]]:
    """The contestants of other libraries, by name."""
    makers = {
        "Pillow, image by image": pillow,
        "kornia": kornia,
        "albumentations, image by image": albumentations,
        "torchvision v2, one draw for the batch": torchvision_v2,
    }
    return {name: partial(make(size, has_blur), images) for name, make in makers.items()}


def ours(
    make: Callable[[ViewMaker], None],
    standard: Callable[[], Augmentation],
    heavy: Callable[[], Augmentation],
) -> dict[str, Callable[[], object]]:
    """This project's contestants: views made by T and T̂, with and without torch.compile."""
    require_compiler(torch.device("cpu"))
    compiled, plain = (ViewMaker(standard(), heavy(), "dssl") for _ in range(2))
    compiled.compile()
    return {"this project, compiled": partial(make, compiled), "this project": partial(make, plain)}
