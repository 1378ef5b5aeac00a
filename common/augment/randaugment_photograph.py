"""RandAugment of a whole photograph of which a crop is kept, by Pillow, for loader workers.

A worker has no batch: for one image Pillow's loops are faster than tensors. Equal to the bit to
`RandAugment.apply`, then the crop; each operation computes no more than what the crop shows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import floor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor

from common.augment.affine import (
    Matrix,
    fixed_point,
    rotation,
    shear_along_x,
    shear_along_y,
)
from common.augment.colour import blend
from common.augment.operations import (
    CUTOUT_COLOUR,
    OPERATIONS,
    cutout_box,
    equalize_tables,
    stretch_tables,
)

# Operations in which tensors are faster.
BY_TENSOR = ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Sharpness")

Box = tuple[int, int, int, int]  # left, top, right, bottom, in the photograph's pixels
Table = list[int]  # the new level of each of red's levels, green's, then blue's


class Step(NamedTuple):
    """One operation with its strength, sign included, and Cutout's centre."""

    name: str
    value: float
    centre: tuple[float, float]  # x, y in pixels


def rand_augment_crop(photograph: Tensor, steps: Sequence[Step], box: Box) -> Tensor:
    """A part of the augmented photograph: uint8 `[3, H, W]` to `[3, bottom − top, right − left]`.

    Args:
        steps: the operations, in this order.
        box: the part that is kept, within the photograph.
    """
    height, width = photograph.shape[1:]
    boxes = [box]
    for step in reversed(steps):
        boxes.insert(0, _needed(step, boxes[0], height, width))
    left, top, right, bottom = boxes[0]
    part = photograph[:, top:bottom, left:right]
    image = None  # the part in Pillow's memory, where it was last computed there
    for index, step in enumerate(steps):
        before, after = boxes[index : index + 2]
        # Tensors are faster here, unless the part is in Pillow's memory and has to be there again.
        stays = image is not None and any(later.name not in BY_TENSOR for later in steps[index:])
        if step.name == "Sharpness" or (step.name in BY_TENSOR and not stays):
            part = part if image is None else _as_tensor(image)
            part = OPERATIONS[step.name](part[None], step.value)[0]
            left, top = before[:2]
            part = part[:, after[1] - top : after[3] - top, after[0] - left : after[2] - left]
            image = None
        else:
            image = Image.fromarray(part.permute(1, 2, 0).numpy()) if image is None else image
            image = _operate(image, step, before, after, height, width)
    return part if image is None else _as_tensor(image)


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _needed(step: Step, box: Box, height: int, width: int) -> Box:
    """What a step has to see of the photograph to compute `box` of its result."""
    left, top, right, bottom = box
    if step.name in ("AutoContrast", "Equalize", "Contrast"):
        return 0, 0, width, height
    if step.name == "Sharpness":
        return max(left - 1, 0), max(top - 1, 0), min(right + 1, width), min(bottom + 1, height)
    if step.name in MOVES:
        a, b, c, d, e, f = fixed_point(MOVES[step.name](step.value, height, width))
        corners = [(x, y) for x in (left, right - 1) for y in (top, bottom - 1)]
        xs = [(a * x + b * y + c) >> 16 for x, y in corners]
        ys = [(d * x + e * y + f) >> 16 for x, y in corners]
        left, top = max(min(xs), 0), max(min(ys), 0)
        right, bottom = min(max(xs) + 1, width), min(max(ys) + 1, height)
        if left >= right or top >= bottom:  # all black: of no pixel of the photograph
            return 0, 0, 1, 1
        return left, top, right, bottom
    return box


def _operate(
    image: Image.Image, step: Step, before: Box, after: Box, height: int, width: int
) -> Image.Image:
    """From the part `before` of the photograph to the part `after` of the step's result."""
    name, value, centre = step
    if name in MOVES:
        matrix = MOVES[name](value, height, width)
        return _move(image, fixed_point(matrix), before, after)
    if name == "Cutout":
        square = cutout_box(torch.tensor(centre), value, height, width).tolist()
        left, top = after[:2]
        inside = (square[0] - left, square[1] - top, square[2] - left, square[3] - top)
        ImageDraw.Draw(image).rectangle(inside, CUTOUT_COLOUR)
        return image
    if name == "Color":
        return ImageEnhance.Color(image).enhance(value)
    if name == "AutoContrast":
        table = _auto_contrast_table(image)
    elif name == "Equalize":
        table = equalize_tables(torch.tensor(image.histogram()).view(3, 256)).flatten().tolist()
    elif name == "Contrast":
        table = _contrast_table(image, value)
    else:
        table = _table(name, value)
    return _cut(image, before, after).point(table)


def _cut(image: Image.Image, before: Box, after: Box) -> Image.Image:
    left, top = before[:2]
    if before == after:
        return image
    return image.crop((after[0] - left, after[1] - top, after[2] - left, after[3] - top))


def _move(image: Image.Image, matrix: tuple[int, ...], before: Box, after: Box) -> Image.Image:
    a, b, c, d, e, f = matrix
    # From the one part's corner to the other's. In 16.16 fixed point, whose numbers float64 holds:
    # Pillow takes half a pixel off and gets the same integers.
    left, top = after[:2]
    c += a * left + b * top - (before[0] << 16)
    f += d * left + e * top - (before[1] << 16)
    numbers = (a, b, c - (a + b) / 2, d, e, f - (d + e) / 2)
    size = after[2] - left, after[3] - top
    return image.transform(size, Image.Transform.AFFINE, [number / 65536 for number in numbers])


def _auto_contrast_table(image: Image.Image) -> Table:
    occurs = torch.tensor(image.histogram()).view(3, 256) > 0
    level = torch.arange(256)
    low, high = level.where(occurs, 255).amin(1), level.where(occurs, 0).amax(1)
    return stretch_tables(low, high).flatten().tolist()


def _contrast_table(image: Image.Image, value: float) -> Table:
    counts = torch.tensor(image.convert("L").histogram())
    level = torch.arange(256)
    total, count = int((counts * level).sum()), image.width * image.height
    mean = torch.tensor(float((total + count // 2) // count))
    return blend(mean, level.to(torch.float32), value).to(torch.uint8).tolist() * 3


@lru_cache(maxsize=16)
def _table(name: str, value: float) -> Table:
    """Of an operation that looks at nothing but a level."""
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, -1)
    return OPERATIONS[name](levels, value).flatten().tolist()


# Matrices by strength, height and width; translations move by whole pixels.
MOVES: dict[str, Callable[[float, int, int], Matrix]] = {
    "Rotate": rotation,
    "ShearX": lambda value, height, width: shear_along_x(value),
    "ShearY": lambda value, height, width: shear_along_y(value),
    "TranslateX": lambda value, height, width: (1.0, 0.0, floor(value + 0.5), 0.0, 1.0, 0.0),
    "TranslateY": lambda value, height, width: (1.0, 0.0, 0.0, 0.0, 1.0, floor(value + 0.5)),
}
