"""A data set of ten kinds of coloured shapes that is drawn on the spot and needs no download.

Every picture scatters sixteen glyphs of one kind, its class, over a soft background. Position,
tilt, size and colour are drawn anew for every glyph, so the kind is all that the glyphs of a
picture share. So that little else tells pictures apart, every picture holds all hues and every kind
covers about the same area. Glyphs stand nearly upright: direction is part of what makes a kind.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# The functions below map the coordinates x and y (pointing down), in units of the radius of the
# glyph, to the distance from its outline: negative inside, positive outside. Their constants give
# every kind an area of about 1.8, or the mean brightness of a picture would betray its class.
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

_GLYPHS = 16
_SMALLEST, _LARGEST = 0.09, 0.15  # The radius of a glyph, relative to the side of the picture.
_TILT = math.radians(18)  # The most by which a glyph leans to either side.
_CHUNK = 2**22  # Pixels rendered at once, which bounds the memory.


def _colours(hues: Tensor) -> Tensor:
    """Turn hues [...], in turns of the colour wheel, into vivid colours [..., 3] in [0, 1]."""
    return 0.5 + 0.5 * torch.cos(2 * math.pi * (hues.unsqueeze(-1) + torch.arange(3) / 3))


def _render(signed_distance: SignedDistance, glyphs: Tensor, knots: Tensor, size: int) -> Tensor:
    """Draw pictures of one kind from numbers that are uniform in [0, 1).

    glyphs: float32 [pictures, 16, 6], what sets them apart; knots: float32 [pictures, 9, 2], the
    hue and brightness of the background on a 3 x 3 grid. Returns uint8 [pictures, 3, size, size].
    """
    background = 0.05 + 0.15 * _colours(knots[..., 0]) + 0.4 * knots[..., 1:]
    canvas = functional.interpolate(
        background.transpose(1, 2).unflatten(2, (3, 3)), size=(size, size), mode="bicubic"
    )
    axis = (torch.arange(size) + 0.5) / size
    # Sharing the colour wheel out among the glyphs leaves no picture with a tint of its own.
    shares = glyphs[..., 4].argsort(1) / _GLYPHS
    for index in range(_GLYPHS):
        right, down, lean, scale, hue, paleness = glyphs[:, index, :, None, None].unbind(1)
        radius = _SMALLEST + (_LARGEST - _SMALLEST) * scale
        # Glyphs that leave the picture on one side return on the other.
        x = ((axis - right + 0.5) % 1 - 0.5) / radius
        y = ((axis[:, None] - down + 0.5) % 1 - 0.5) / radius
        angle = _TILT * (2 * lean - 1)
        cosine, sine = angle.cos(), angle.sin()
        distance = signed_distance(cosine * x + sine * y, cosine * y - sine * x)
        # A dark halo sets the glyph off from whatever lies beneath it.
        canvas = canvas * (1 - 0.3 * torch.exp(-5 * distance.clamp(min=0))).unsqueeze(1)
        # An edge that blends over the width of one pixel is anti-aliased.
        coverage = (0.5 - distance * radius * size).clamp(0, 1).unsqueeze(1)
        vivid = _colours(shares[:, index] + 0.1 * hue[:, 0, 0])
        colour = torch.lerp(vivid, torch.ones(()), 0.2 + 0.5 * paleness[:, 0])
        canvas = torch.lerp(canvas, colour[:, :, None, None], coverage)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` pictures of `size` x `size` pixels and their labels.

    Returns images, uint8 [count, 3, size, size], and labels, int64 [count]; label i is i % 10, an
    index into `CLASS_NAMES`. Picture i depends on `seed` and i alone: a larger count appends
    pictures, and another size draws the same pictures at that size.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, _GLYPHS * 6 + 9 * 2, generator=generator)
    glyphs = numbers[:, : _GLYPHS * 6].unflatten(1, (_GLYPHS, 6))
    knots = numbers[:, _GLYPHS * 6 :].unflatten(1, (9, 2))
    labels = torch.arange(count) % len(CLASS_NAMES)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for label, signed_distance in enumerate(_KINDS.values()):
        for chunk in torch.nonzero(labels == label).flatten().split(max(1, _CHUNK // size**2)):
            images[chunk] = _render(signed_distance, glyphs[chunk], knots[chunk], size)
    return images, labels
