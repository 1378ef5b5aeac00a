"""The sixteen operations of RandAugment on 8-bit batches, equal to Pillow to the bit on the CPU.

Images are uint8 `[B, 3, H, W]` tensors on any device. The operations use integers, or single
float32 operations in Pillow's own order, so that other devices have no room to round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from common.augment.base import constant, levels_type, to_uint8
from common.augment.colour import blend, brightness_, contrast_, saturation_

CUTOUT_COLOUR = (125, 123, 114)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Map each channel of each image by its own table, uint8 `[B, 3, 256]`."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


@lru_cache(maxsize=4)
def stretch_tables(device: torch.device) -> Tensor:
    """Tables that stretch low..high to 0..255, uint8 `[256, 256, 256]` by (low, high, value).

    Made on the CPU in float64, since Pillow's own rounding errors decide where a table steps and
    not every device has float64. 16 MiB, kept.
    """
    value = torch.arange(256, dtype=torch.float64)
    high = value[:, None]
    tables = torch.empty(256, 256, 256, dtype=torch.uint8)
    for low in range(256):  # one by one, at 512 KiB of float64 a time
        # Tensor by tensor: torch turns number / tensor into a product with the reciprocal.
        scale = torch.full_like(high, 255.0) / (high - low)
        table = value * scale
        table += -low * scale
        table = table.nan_to_num_().clamp_(0, 255).to(torch.uint8)
        tables[low] = torch.where(high > low, table, value.to(torch.uint8))
    return tables.to(device)


def auto_contrast(images: Tensor, value: float = 0.0) -> Tensor:
    """Stretch each channel to 0..255; `value` has no effect."""
    channels = images.flatten(2)
    low, high = channels.amin(2).long(), channels.amax(2).long()
    return _look_up(images, stretch_tables(images.device)[low, high])


def equalize(images: Tensor, value: float = 0.0) -> Tensor:
    """Flatten each channel's histogram; `value` has no effect."""
    levels = images.flatten(2)
    pixels = levels.long()
    tables = equalize_tables(pixels, levels.amax(2, keepdim=True).long())
    return tables.to(torch.uint8).gather(2, pixels).view_as(images)


def equalize_tables(pixels: Tensor, top: Tensor) -> Tensor:
    """What Equalize makes of each level of each channel.

    Args:
        pixels: int64 `[B, 3, H·W]`.
        top: int64 `[B, 3, 1]`, the highest level that occurs.

    Returns:
        int64 `[B, 3, 256]`, 0..255.
    """
    histogram = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=pixels.device)
    ones = torch.ones(1, dtype=torch.int32, device=pixels.device).expand_as(pixels)
    histogram.scatter_add_(2, pixels, ones)
    below = histogram.cumsum(2) - histogram
    step = torch.div(below.gather(2, top), 255, rounding_mode="floor")
    half = torch.div(step, 2, rounding_mode="floor")
    tables = torch.div(below + half, step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    return torch.where(step > 0, tables, torch.arange(256, device=pixels.device))


def invert(images: Tensor, value: float = 0.0) -> Tensor:
    """255 − pixel; `value` has no effect."""
    return images.bitwise_not()


def posterize(images: Tensor, value: float) -> Tensor:
    """Keep the max(1, int(value)) highest bits of each pixel."""
    dropped = 8 - max(1, int(value))
    return images & (255 >> dropped << dropped)


def solarize(images: Tensor, value: float) -> Tensor:
    """Invert the pixels at or above `value` (0..256)."""
    threshold = math.ceil(value)
    if threshold <= 0:
        return invert(images)
    if threshold > 255:
        return images.clone()
    # 0 below the threshold, else 255: comparisons of uint8 are slow on CPUs, clamps are fast.
    inverted = images.clamp(threshold - 1, threshold).sub_(threshold - 1).mul_(255)
    return inverted.bitwise_xor_(images)  # an exclusive or with 255 inverts


def solarize_add(images: Tensor, value: float) -> Tensor:
    """Add int(value), clip to 0..255, then invert the pixels at or above 128."""
    added = int(value)
    return solarize(images.clamp(max=255 - added).add_(added), 128)


def smooth(pixels: Tensor) -> Tensor:
    """Smooth whole levels as Sharpness does: `[B, 3, H, W]` to float32 `[B, 3, H − 2, W − 2]`.

    int16 or float32; the nine pixels around each weigh 1, itself 5, rounded.
    """
    columns = (pixels[..., :-2] + pixels[..., 1:-1]).add_(pixels[..., 2:])
    total = (columns[..., :-2, :] + columns[..., 1:-1, :]).add_(columns[..., 2:, :])
    total.add_(pixels[..., 1:-1, 1:-1], alpha=4)
    # Pillow's ⌊total/13 + ½⌋ by way of float32, where the nearest half is 1/26 away.
    return total.to(torch.float32).mul_(1 / 13).add_(0.5).floor_()


def sharpened_inside(images: Tensor, value: float) -> Tensor:
    """`sharpness` of uint8 `[B, 3, H, W]` without the outermost pixels: `[B, 3, H − 2, W − 2]`."""
    pixels = images.to(levels_type())
    inside = pixels[..., 1:-1, 1:-1].to(torch.float32, copy=True)
    return to_uint8(blend(smooth(pixels), inside, value))


def sharpness(
    images: Tensor,
    value: float,
    sharpen: Callable[[Tensor, float], Tensor] = sharpened_inside,
) -> Tensor:
    """Away from the smoothed image by factor `value`; the outermost pixels stay as they are.

    Args:
        sharpen: `sharpened_inside`, or that compiled.
    """
    sharpened = images.clone()
    if min(images.shape[2:]) >= 3:
        sharpened[..., 1:-1, 1:-1] = sharpen(images, value)
    return sharpened


def color(images: Tensor, value: float) -> Tensor:
    """Away from the image's grey by factor `value`."""
    return to_uint8(saturation_(images.to(levels_type()), value))


def contrast(images: Tensor, value: float) -> Tensor:
    """Away from the image's mean grey by factor `value`."""
    return to_uint8(contrast_(images.to(levels_type()), value))


def brightness(images: Tensor, value: float) -> Tensor:
    """Multiply by `value`."""
    return to_uint8(brightness_(images.to(levels_type()), value))


def _fixed(number: float) -> int:
    """Pillow's 16.16 fixed point."""
    return math.floor(number * 65536.0 + 0.5)


def _affine_source(
    matrix: tuple[float, float, float, float, float, float],
    height: int,
    width: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where each output pixel comes from under Pillow's nearest-neighbour affine transform.

    Returns:
        The source pixel's index in the flattened image, int64 `[H·W]`, 0 where it lies outside;
        and uint8 `[H·W]`, 1 where it lies inside.
    """
    a, b, c, d, e, f = matrix
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source_x = (_fixed(c + a * 0.5 + b * 0.5) + _fixed(a) * x + _fixed(b) * y) >> 16
    source_y = (_fixed(f + d * 0.5 + e * 0.5) + _fixed(d) * x + _fixed(e) * y) >> 16
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = torch.where(inside, source_y * width + source_x, 0)
    return index.flatten().to(device), inside.flatten().to(torch.uint8).to(device)


# A training's views have one size, and a few matrices.
_kept_affine_source = lru_cache(maxsize=32)(_affine_source)


def _affine(images: Tensor, matrix: tuple[float, float, float, float, float, float]) -> Tensor:
    height, width = images.shape[2:]
    # Whole photographs come in any size: keeping theirs would cost gigabytes and serve nothing.
    source = _kept_affine_source if height * width <= 2**16 else _affine_source
    index, inside = source(matrix, height, width, images.device)
    pixels = images.flatten(2)
    return pixels.gather(2, index.expand_as(pixels)).mul_(inside).view_as(images)


def rotate(images: Tensor, value: float) -> Tensor:
    """Rotate counter-clockwise by `value` degrees about the centre; black fill, size kept."""
    height, width = images.shape[2:]
    angle = value % 360.0
    if angle == 0:
        return images.clone()
    if angle == 180:
        return images.flip((2, 3))
    if angle in (90, 270) and height == width:
        return images.rot90(1 if angle == 90 else 3, (2, 3))
    radians = -math.radians(angle)
    cosine, sine = round(math.cos(radians), 15), round(math.sin(radians), 15)
    minus_sine = round(-math.sin(radians), 15)
    x, y = width / 2, height / 2
    # Pillow's order: the centre taken to the origin, then brought back.
    c = (cosine * -x + sine * -y + 0.0) + x
    f = (minus_sine * -x + cosine * -y + 0.0) + y
    return _affine(images, (cosine, sine, c, minus_sine, cosine, f))


def shear_x(images: Tensor, value: float) -> Tensor:
    """Shift row y by `value` · y pixels; black fill."""
    if value == 0:
        return images.clone()
    return _affine(images, (1.0, value, 0.0, 0.0, 1.0, 0.0))


def shear_y(images: Tensor, value: float) -> Tensor:
    """Shift column x by `value` · x pixels; black fill."""
    if value == 0:
        return images.clone()
    return _affine(images, (1.0, 0.0, 0.0, value, 1.0, 0.0))


def _translate(images: Tensor, value: float, dimension: int) -> Tensor:
    length = images.shape[dimension]
    # Pillow samples at x + value + 0.5, so the content moves against the sign of the value.
    shift = max(-length, min(length, math.floor(value + 0.5)))
    translated = torch.zeros_like(images)
    kept = length - abs(shift)
    target = translated.narrow(dimension, max(0, -shift), kept)
    target.copy_(images.narrow(dimension, max(0, shift), kept))
    return translated


def translate_x(images: Tensor, value: float) -> Tensor:
    """Move the content `value` pixels to the left; black fill."""
    return _translate(images, value, 3)


def translate_y(images: Tensor, value: float) -> Tensor:
    """Move the content `value` pixels up; black fill."""
    return _translate(images, value, 2)


def cutout(images: Tensor, value: float, centre: Tensor) -> Tensor:
    """Fill a square of `value` pixels with grey-brown (125, 123, 114).

    Args:
        centre: float `[B, 2]`, (x, y) of the square's centre, in pixels.
    """
    height, width = images.shape[2:]
    left, top, right, bottom = cutout_box(centre, value, height, width).split(1, dim=1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)
    columns, rows = (x >= left) & (x <= right), (y >= top) & (y <= bottom)
    # 255 inside the box, 0 outside: on CPUs bits are several times faster than torch.where.
    box = rows[:, None, :, None].to(torch.uint8) * (255 * columns[:, None, None, :].to(torch.uint8))
    colour = constant(CUTOUT_COLOUR, images.device).to(torch.uint8)[:, None, None]
    return (images ^ colour).bitwise_and_(box).bitwise_xor_(images)


def cutout_box(centre: Tensor, value: float, height: int, width: int) -> Tensor:
    """The first and last pixels that Cutout fills: int64 `[…, 4]`, left, top, right, bottom.

    At the left and top border the square moves and keeps its size; at the others it is cut.

    Args:
        centre: float `[…, 2]`, (x, y), in pixels.
    """
    start = (centre.to(torch.float64) - value / 2).clamp(min=0).floor()
    limits = torch.tensor([width, height], dtype=torch.float64, device=centre.device)
    stop = torch.minimum(start + value, limits).floor()  # the rectangle includes its far edge
    return torch.cat([start, stop], dim=-1).to(torch.int64)


# The paper's names, in the order of its table; each maps uint8 images `[B, 3, H, W]` and the
# signed strength itself (degrees, pixels, a factor: not M). Cutout also takes its centres.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Invert": invert,
    "Rotate": rotate,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "Cutout": cutout,
    "TranslateX": translate_x,
    "TranslateY": translate_y,
}
