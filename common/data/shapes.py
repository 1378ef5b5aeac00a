"""A generated data set of ten kinds of coloured shapes, which needs no download.

Every picture is a lattice of glyphs of one kind, its class. Phase, spacing and tilt of the lattice,
the colour of every glyph and the background are random, so that single pixels say little about the
class, while crops and changes of colour keep it. Glyphs are nearly upright: some kinds differ by
their direction only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# The functions below map the coordinates x and y (pointing down), in units of the radius of the
# glyph, to the distance from its outline: negative inside, positive outside. Their constants give
# every kind an area of about 1.8; otherwise the mean brightness would tell the class.
SignedDistance = Callable[[Tensor, Tensor], Tensor]


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _eighth_turn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x + y) * math.sqrt(0.5), (y - x) * math.sqrt(0.5)


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.76


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.19


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Folding the plane onto half of one of the five points leaves a single edge to measure.
    sector, edge = 2 * math.pi / 5, 3 * math.pi / 8
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    return torch.hypot(x, y) * torch.cos(edge - angle.abs()) - 1.17 * math.cos(edge)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * math.sqrt(0.75) - y * 0.5, y) - 0.59


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return _box(*_eighth_turn(x, y), 0.67, 0.67)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.26), _box(x, y, 0.26, 1.0))


def _saltire(x: Tensor, y: Tensor) -> Tensor:
    return _cross(*_eighth_turn(x, y))


def _rows(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y.abs() - 0.48, 0.92, 0.25)


def _columns(x: Tensor, y: Tensor) -> Tensor:
    return _rows(y, x)


def _checker(x: Tensor, y: Tensor) -> Tensor:
    half = 0.475
    return torch.minimum(_box(x - half, y - half, half, half), _box(x + half, y + half, half, half))


_KINDS: dict[str, SignedDistance] = {
    "disc": _disc,
    "ring": _ring,
    "star": _star,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "saltire": _saltire,
    "rows": _rows,
    "columns": _columns,
    "checker": _checker,
}
CLASS_NAMES: tuple[str, ...] = tuple(_KINDS)
SPLITS = {"train": 6000, "val": 1000}  # pictures in each

_CELLS = 12  # Cells of the lattice along a side, enough to cover any picture at any tilt.
_SMALLEST, _LARGEST = 0.2, 0.34  # The side of a cell, relative to the side of the picture.
_RADIUS = 0.46  # Of a glyph, relative to its cell.
_BACKGROUND = 0.5  # The brightest; random, so that brightness does not tell the class.
_TILT = math.radians(12)  # The largest tilt of the lattice, to either side.
_CHUNK = 2**22  # Pixels rendered at once, which bounds the memory.


def _colours(hues: Tensor) -> Tensor:
    """Saturated colours [..., 3] in [0, 1] of hues [...], in turns of the colour wheel."""
    return 0.5 + 0.5 * torch.cos(2 * math.pi * (hues.unsqueeze(-1) + torch.arange(3) / 3))


def _render(signed_distance: SignedDistance, whole: Tensor, cells: Tensor, size: int) -> Tensor:
    """Draw pictures of one kind from numbers that are uniform in [0, 1).

    whole: float32 [pictures, 6], one row for each picture; cells: float32 [pictures, 2,
    cells²], hue and paleness of every glyph. Returns uint8 [pictures, 3, size, size].
    """
    spacing, lean, right, down, tint, brightness = whole[:, :, None, None].unbind(1)
    side = _SMALLEST * (_LARGEST / _SMALLEST) ** spacing
    angle = _TILT * (2 * lean - 1)
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x = (angle.cos() * axis + angle.sin() * axis[:, None]) / side + right + _CELLS / 2
    y = (angle.cos() * axis[:, None] - angle.sin() * axis) / side + down + _CELLS / 2
    distance = signed_distance((x % 1 - 0.5) / _RADIUS, (y % 1 - 0.5) / _RADIUS)
    # An edge that blends over the width of one pixel is anti-aliased.
    coverage = (0.5 - distance * _RADIUS * side * size).clamp(0, 1).unsqueeze(1)
    cell = (y.long() * _CELLS + x.long()).flatten(1).unsqueeze(1).expand(-1, 2, -1)
    hue, paleness = cells.gather(2, cell).unflatten(2, (size, size)).unbind(1)
    colour = _colours(hue).movedim(-1, 1)
    colour = torch.lerp(colour, torch.ones(()), (0.1 + 0.5 * paleness).unsqueeze(1))
    background = 0.15 * _colours(tint).movedim(-1, 1) + _BACKGROUND * brightness.unsqueeze(1)
    canvas = torch.lerp(background.expand_as(colour), colour, coverage)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` pictures of `size` x `size` pixels and their labels.

    Returns images, uint8 [count, 3, size, size], and labels, int64 [count]; label i is i % 10, an
    index into `CLASS_NAMES`. Picture i depends on `seed` and i only: a larger count appends
    pictures, and another size draws the same pictures at that size.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, 6 + 2 * _CELLS**2, generator=generator)
    whole, cells = numbers[:, :6], numbers[:, 6:].unflatten(1, (2, _CELLS**2))
    labels = torch.arange(count) % len(CLASS_NAMES)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for label, signed_distance in enumerate(_KINDS.values()):
        for chunk in torch.nonzero(labels == label).flatten().split(max(1, _CHUNK // size**2)):
            images[chunk] = _render(signed_distance, whole[chunk], cells[chunk], size)
    return images, labels


def shapes_split(split: str, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """As `shapes`, for the "train" or the "val" split; they have no picture in common."""
    return shapes(SPLITS[split], size, 2 * seed + (split != "train"))
