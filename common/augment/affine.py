"""Pillow's affine transform: nearest neighbour, black beyond the border, size kept."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# (a, b, c, d, e, f): the result at (x, y) is the image at (a x + b y + c, d x + e y + f).
Matrix = tuple[float, float, float, float, float, float]


def rotation(degrees: float, height: int, width: int) -> Matrix:
    """Counter-clockwise about the centre."""
    radians = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(radians), 15), round(math.sin(radians), 15)
    minus_sine = round(-math.sin(radians), 15)
    x, y = width / 2, height / 2
    # Pillow's order: the centre taken to the origin, then brought back.
    c = (cosine * -x + sine * -y + 0.0) + x
    f = (minus_sine * -x + cosine * -y + 0.0) + y
    return (cosine, sine, c, minus_sine, cosine, f)


def shear_along_x(value: float) -> Matrix:
    """Row y is shifted by `value` · y pixels."""
    return (1.0, value, 0.0, 0.0, 1.0, 0.0)


def shear_along_y(value: float) -> Matrix:
    """Column x is shifted by `value` · x pixels."""
    return (1.0, 0.0, 0.0, value, 1.0, 0.0)


def fixed_point(matrix: Matrix) -> tuple[int, int, int, int, int, int]:
    """The matrix as Pillow uses it, in 16.16 fixed point, and from pixel centre to pixel centre.

    The result's pixel (x, y) comes from pixel ((a x + b y + c) >> 16, (d x + e y + f) >> 16).
    """
    a, b, c, d, e, f = matrix
    c, f = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
    a, b, c, d, e, f = (math.floor(number * 65536.0 + 0.5) for number in (a, b, c, d, e, f))
    return a, b, c, d, e, f


def _sources(matrix: Matrix, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each pixel of the result comes from.

    Returns:
        The source pixel's index in the flattened image, int64 `[H·W]`, 0 where it is outside; and
        uint8 `[H·W]`, 1 where it is inside.
    """
    a, b, c, d, e, f = fixed_point(matrix)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source_x, source_y = (c + a * x + b * y) >> 16, (f + d * x + e * y) >> 16
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = torch.where(inside, source_y * width + source_x, 0)
    return index.flatten(), inside.flatten().to(torch.uint8)


# A training's views have one size, and a few matrices.
_kept_sources = lru_cache(maxsize=32)(_sources)


def affine(images: Tensor, matrix: Matrix) -> Tensor:
    """Transform uint8 images `[B, 3, H, W]`, on a CPU."""
    height, width = images.shape[2:]
    # Photographs differ in size: to keep these for each would take gigabytes without any use.
    sources = _kept_sources if height * width <= 2**16 else _sources
    index, inside = sources(matrix, height, width)
    pixels = images.flatten(2)
    return pixels.gather(2, index.expand_as(pixels)).mul_(inside).view_as(images)
