"""The sixteen operations of RandAugment on 8-bit batches, equal to Pillow to the bit on the CPU.

Images are uint8 `[B, 3, H, W]` tensors on the CPU. The operations use integers, or single float32
operations in Pillow's own order. GPUs have `randaugment_gpu.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.augment.affine import affine, rotation, shear_along_x, shear_along_y
from common.augment.base import constant, levels_type, to_uint8
from common.augment.colour import blend, brightness_, contrast_, saturation_

CUTOUT_COLOUR = (125, 123, 114)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Map each channel of each image by its own table, uint8 `[B, 3, 256]`."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def stretch_tables(low: Tensor, high: Tensor) -> Tensor:
    """AutoContrast's tables, which stretch low..high to 0..255: int64 `[…]` to uint8 `[…, 256]`.

    In float64, since Pillow's own rounding errors decide where a table steps; on a CPU.
    """
    value = torch.arange(256, dtype=torch.float64)
    low, high = low.to(torch.float64)[..., None], high.to(torch.float64)[..., None]
    # Tensor by tensor: torch turns number / tensor into a product with the reciprocal.
    scale = torch.full_like(high, 255.0) / (high - low)
    table = value * scale
    table += -low * scale
    table = table.nan_to_num_().clamp_(0, 255)
    return torch.where(high > low, table, value).to(torch.uint8)


def auto_contrast(images: Tensor, value: float = 0.0) -> Tensor:
    """Stretch each channel to 0..255; `value` has no effect."""
    channels = images.flatten(2)
    return _look_up(images, stretch_tables(channels.amin(2), channels.amax(2)))


def equalize(images: Tensor, value: float = 0.0) -> Tensor:
    """Flatten each channel's histogram; `value` has no effect."""
    pixels = images.flatten(2).long()
    return equalize_tables(histograms(pixels)).gather(2, pixels).view_as(images)


def histograms(pixels: Tensor) -> Tensor:
    """How often each level occurs in each channel: int64 `[B, 3, H·W]` to int32 `[B, 3, 256]`."""
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=pixels.device)
    ones = torch.ones(1, dtype=torch.int32, device=pixels.device).expand_as(pixels)
    return counts.scatter_add_(2, pixels, ones)


def equalize_tables(histograms: Tensor) -> Tensor:
    """Equalize's tables for histograms: integer `[…, 256]` to uint8 `[…, 256]`."""
    below = histograms.cumsum(-1) - histograms
    # All pixels but those of the highest level that occurs.
    lower = (below * (histograms > 0)).amax(-1, keepdim=True)
    step = torch.div(lower, 255, rounding_mode="floor")
    half = torch.div(step, 2, rounding_mode="floor")
    tables = torch.div(below + half, step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    unchanged = torch.arange(256, device=histograms.device)
    return torch.where(step > 0, tables, unchanged).to(torch.uint8)


def invert(images: Tensor, value: float = 0.0) -> Tensor:
    """255 − pixel; `value` has no effect."""
    return images.bitwise_not()


def posterize(images: Tensor, value: float) -> Tensor:
    """Keep the max(1, int(value)) highest bits of each pixel; `value` 0..8."""
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
    """Add int(value), 0..255, clip to 255, then invert the pixels at or above 128."""
    added = int(value)
    return solarize(images.clamp(max=255 - added).add_(added), 128)


def smooth(pixels: Tensor) -> Tensor:
    """Smooth whole levels as Sharpness does: `[B, 3, H, W]` to float32 `[B, 3, H − 2, W − 2]`.

    int16 or float32; a pixel weighs 5, each of the eight around it 1; rounded.
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
    """The smoothed image (`value` 0) to the image (1) and beyond; the outermost pixels stay.

    Args:
        value: at least 0.
        sharpen: `sharpened_inside`, or that compiled.
    """
    sharpened = images.clone()
    if min(images.shape[2:]) >= 3:
        sharpened[..., 1:-1, 1:-1] = sharpen(images, value)
    return sharpened


def color(images: Tensor, value: float) -> Tensor:
    """The image's grey (`value` 0) to the image (1) and beyond; `value` is at least 0."""
    return to_uint8(saturation_(images.to(levels_type()), value))


def contrast(images: Tensor, value: float) -> Tensor:
    """The image's mean grey (`value` 0) to the image (1) and beyond; `value` is at least 0."""
    return to_uint8(contrast_(images.to(levels_type()), value))


def brightness(images: Tensor, value: float) -> Tensor:
    """Multiply by `value`, at least 0."""
    return to_uint8(brightness_(images.to(levels_type()), value))


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
    return affine(images, rotation(value, height, width))


def shear_x(images: Tensor, value: float) -> Tensor:
    """Shift row y by `value` · y pixels; black fill."""
    if value == 0:
        return images.clone()
    return affine(images, shear_along_x(value))


def shear_y(images: Tensor, value: float) -> Tensor:
    """Shift column x by `value` · x pixels; black fill."""
    if value == 0:
        return images.clone()
    return affine(images, shear_along_y(value))


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
    """Fill the square that `cutout_box` gives with grey-brown (125, 123, 114).

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
