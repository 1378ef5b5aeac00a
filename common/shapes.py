"""A data set of ten kinds of coloured shapes that is drawn on the spot and needs no download.

Every picture scatters glyphs of one kind, its class, over a softly coloured background. Position,
rotation, size and colour are drawn anew for every glyph, so the kind is all that the glyphs of a
picture have in common: it is what two crops of one picture share and what tells pictures apart.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# A signed distance function maps the coordinates x and y, in units of the radius of the glyph, to
# the distance from its outline: negative inside, positive outside.
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


def _checker(x: Tensor, y: Tensor) -> Tensor:
    # The product of two waves changes its sign from one field to the next; the box keeps 3 x 3.
    fields = torch.cos(x * math.pi / 0.6) * torch.cos(y * math.pi / 0.6)
    return torch.maximum(fields * -0.3, _box(x, y, 0.9, 0.9))


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return _box(*_eighth_turn(x, y), 0.67, 0.67)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.0, 0.26), _box(x, y, 0.26, 1.0))


def _saltire(x: Tensor, y: Tensor) -> Tensor:
    return _cross(*_eighth_turn(x, y))


def _rows(x: Tensor, y: Tensor) -> Tensor:
    # The remainder repeats one bar for ever; the box keeps three.
    bars = (torch.remainder(y + 0.35, 0.7) - 0.35).abs() - 0.18
    return torch.maximum(bars, _box(x, y, 0.84, 0.9))


def _columns(x: Tensor, y: Tensor) -> Tensor:
    return _rows(y, x)


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

_GRID = 3  # One glyph per cell of a 3 x 3 grid: scattered, but seldom on top of one another.
_SMALLEST, _LARGEST = 0.14, 0.19  # The radius of a glyph, relative to the side of the picture.
_TILT = math.radians(12)
_CHUNK = 2**22  # Pixels rendered at once, which bounds the memory.


def _hues(turns: Tensor) -> Tensor:
    """Turn hues [...] in [0, 1) into bright saturated colours [..., 3] in [0, 1]."""
    thirds = torch.arange(3) / 3
    return 0.5 + 0.5 * torch.cos(2 * math.pi * (turns.unsqueeze(-1) + thirds))


def _render(
    signed_distance: SignedDistance, glyphs: Tensor, backdrop: Tensor, shift: Tensor, size: int
) -> Tensor:
    """Draw pictures of one kind.

    glyphs: float32 [pictures, glyphs, 6] and backdrop: float32 [pictures, 9, 2], all uniform in
    [0, 1). Returns uint8 [pictures, 3, size, size].
    """
    knots = _hues(backdrop[..., 0]) * 0.15 + backdrop[..., 1:] * 0.15 + 0.05
    canvas = functional.interpolate(
        knots.transpose(1, 2).unflatten(2, (3, 3)), size=(size, size), mode="bicubic"
    )
    axis = (torch.arange(size) + 0.5) / size
    cells = torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID))
    hues = glyphs[..., 4].argsort(1) / _GRID**2
    for index, cell in enumerate(cells):
        across, down, turn, scale, hue, paleness = glyphs[:, index, :, None, None].unbind(1)
        radius = _SMALLEST + (_LARGEST - _SMALLEST) * scale
        # The picture wraps around like a torus, so the grid can start anywhere.
        x = axis - shift[:, 0, None, None] - (cell[0] + 0.6 * across) / _GRID
        y = axis[:, None] - shift[:, 1, None, None] - (cell[1] + 0.6 * down) / _GRID
        x, y = ((x + 0.5) % 1 - 0.5) / radius, ((y + 0.5) % 1 - 0.5) / radius
        angle = _TILT * (2 * turn - 1)
        cosine, sine = angle.cos(), angle.sin()
        distance = signed_distance(cosine * x + sine * y, cosine * y - sine * x)
        # A dark halo sets the glyph off from whatever lies beneath it.
        canvas = canvas * (1 - 0.3 * torch.exp(-distance.clamp(min=0) * 5)).unsqueeze(1)
        coverage = (0.5 - distance * radius * size).clamp(0, 1).unsqueeze(1)
        colour = torch.lerp(
            _hues(hues[:, index] + 0.1 * hue[:, 0, 0]), torch.ones(()), 0.5 + 0.2 * paleness[:, 0]
        )
        canvas = torch.lerp(canvas, colour[:, :, None, None], coverage)
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def shapes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` pictures of `size` x `size` pixels and their labels.

    Returns images, uint8 [count, 3, size, size], and labels, int64 [count]; label i is i % 10, an
    index into `CLASS_NAMES`. Picture i depends on `seed` and i alone: a larger count appends
    pictures, another size draws the same pictures at that size.
    """
    generator = torch.Generator().manual_seed(seed)
    glyphs = _GRID**2 * 6
    numbers = torch.rand(count, glyphs + 20, generator=generator)
    labels = torch.arange(count) % len(CLASS_NAMES)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for label, signed_distance in enumerate(_KINDS.values()):
        indices = torch.nonzero(labels == label).flatten()
        for chunk in indices.split(max(1, _CHUNK // size**2)):
            images[chunk] = _render(
                signed_distance,
                numbers[chunk, :glyphs].unflatten(1, (_GRID**2, 6)),
                numbers[chunk, glyphs:-2].unflatten(1, (9, 2)),
                numbers[chunk, -2:],
                size,
            )
    return images, labels
