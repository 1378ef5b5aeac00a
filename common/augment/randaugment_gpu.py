"""RandAugment for GPUs: its sixteen operations in four families, so that few kernels are started.

Equal to the bit to `common/augment/operations.py`, which also makes the families' constants.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.augment.base import constant, sorted_turns
from common.augment.colour import blend, grey, mean_grey
from common.augment.operations import (
    CUTOUT_COLOUR,
    OPERATIONS,
    cutout_box,
    equalize_tables,
    histograms,
    smooth,
    stretch_tables,
)

# Each family's operations, in the order in which their images are sorted.
TABLES = "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness"
BLENDS = "Color", "Contrast", "Sharpness"
MOVES = "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"
SORTED = (*TABLES, *BLENDS, *MOVES, "Cutout")
PLACE = torch.tensor([SORTED.index(name) for name in OPERATIONS])

Values = tuple[tuple[str, float], ...]  # of each operation, its strength without the sign


def rand_augment(images: Tensor, draws: Tensor, values: Values) -> Tensor:
    """RandAugment of uint8 images `[B, 3, H, W]` by draws float32 `[B, turns, 4]` on the CPU."""
    height, width = images.shape[2:]
    value = dict(values)
    tables = _tables(values, images.device)
    sources = _sources(values, height, width, images.device)
    group = PLACE[draws[..., 0].to(torch.int64)]
    move = 2 * (group - SORTED.index(MOVES[0])) + (draws[..., 1] < 0)
    box = cutout_box(draws[..., 2:], value["Cutout"], height, width)
    numbers = [group, move, *box.unbind(2)]
    turns, back = sorted_turns(group, len(SORTED), images.device, numbers)
    for turn in turns:
        images = images.index_select(0, turn.source)
        counts = dict(zip(SORTED, turn.counts[1:], strict=True))
        sizes = [sum(counts[name] for name in names) for names in (TABLES, BLENDS, MOVES)]
        looked_up, blended, moved, cut = images.split([*sizes, counts["Cutout"]])
        table, _, move, box = turn.numbers.split([*sizes, counts["Cutout"]], dim=1)
        if len(looked_up):
            own = tables.index_select(0, table[0])
            _look_up(looked_up, own, counts["AutoContrast"], counts["Equalize"])
        if len(blended):
            _blend(blended, value["Color"], counts["Color"], counts["Contrast"])
        if len(moved):
            _move(moved, sources.index_select(0, move[1]))
        if len(cut):
            _cut(cut, box[2:])
    return images.index_select(0, back)


@lru_cache(maxsize=16)
def _tables(values: Values, device: torch.device) -> Tensor:
    """What each of TABLES makes of each level, uint8 `[7, 3, 256]`; two depend on the image."""
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, -1)
    value = dict(values)
    tables = [OPERATIONS[name](levels, value[name]) for name in TABLES]
    return torch.cat(tables).squeeze(2).to(device)


@lru_cache(maxsize=16)
def _sources(values: Values, height: int, width: int, device: torch.device) -> Tensor:
    """Where each move takes each pixel from: 1 + its index in the flattened image, 0 for black.

    int64 `[10, H·W]`, with each sign.
    """
    number = torch.arange(1, height * width + 1).view(1, 1, height, width)
    # An image of its pixels' numbers in three bytes shows where they went.
    image = torch.cat([number & 255, number >> 8 & 255, number >> 16], dim=1).to(torch.uint8)
    moved = [
        OPERATIONS[name](image, sign * value)
        for name, value in values
        if name in MOVES
        for sign in (1, -1)
    ]
    red, green, blue = torch.cat(moved).flatten(2).long().unbind(1)
    return (red | green << 8 | blue << 16).to(device)


@lru_cache(maxsize=4)
def _stretch_tables(device: torch.device) -> Tensor:
    """AutoContrast's, uint8 `[256, 256, 256]` by (low, high, level): some GPUs have no float64."""
    low, high = torch.arange(256)[:, None], torch.arange(256)
    return torch.cat([stretch_tables(part, high) for part in low.split(1)]).to(device)


# These change a family's images in place, sorted by operation: uint8 `[n, 3, H, W]`.


def _look_up(images: Tensor, tables: Tensor, stretched: int, equalized: int) -> None:
    """Map levels by tables, uint8 `[n, 3, 256]`; those of the first images are made here."""
    pixels = images.flatten(2).long()
    if stretched:
        low, high = pixels[:stretched].aminmax(dim=2)
        tables[:stretched] = _stretch_tables(images.device)[low, high]
    if equalized:
        both = stretched + equalized
        tables[stretched:both] = equalize_tables(histograms(pixels[stretched:both]))
    images.copy_(tables.gather(2, pixels).view_as(images))


def _blend(images: Tensor, value: float, coloured: int, contrasted: int) -> None:
    """Color, Contrast, then Sharpness, all by one factor."""
    pixels = images.to(torch.float32)
    degenerate = pixels.clone()
    both = coloured + contrasted
    if both:
        luma = grey(pixels[:both])
        degenerate[:coloured] = luma[:coloured]
        degenerate[coloured:both] = mean_grey(luma[coloured:])
    if min(images.shape[2:]) >= 3:
        degenerate[both:, :, 1:-1, 1:-1] = smooth(pixels[both:])
    images.copy_(blend(degenerate, pixels, value))


def _move(images: Tensor, sources: Tensor) -> None:
    """Take each pixel from its source, int64 `[n, H·W]`: 1 + its index, 0 for black."""
    pixels = F.pad(images.flatten(2), (1, 0))
    sources = sources[:, None].expand(-1, images.shape[1], -1)
    images.copy_(pixels.gather(2, sources).view_as(images))


def _cut(images: Tensor, box: Tensor) -> None:
    """Fill boxes, int64 `[4, n]`: left, top, right, bottom, each the first or last pixel."""
    height, width = images.shape[2:]
    first, last = box[:, :, None].chunk(2)  # [2, n, 1]: of the columns, of the rows
    place = torch.arange(max(height, width), device=images.device)
    columns, rows = place.clamp(first, last) == place
    inside = rows[:, None, :height, None] & columns[:, None, None, :width]
    colour = constant(CUTOUT_COLOUR, images.device).to(torch.uint8)[:, None, None]
    images.copy_(torch.where(inside, colour, images))
