"""Colour jitter and grey, equal to Pillow where its arithmetic is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.augment.base import (
    Augmentation,
    Draws,
    apply_in_groups,
    draw_chosen,
    levels_type,
    per_image,
    to_uint8,
)
from common.runtime.ranks import send


def blend(degenerate: Tensor, pixels: Tensor, factor: float | Tensor) -> Tensor:
    """`degenerate + factor · (pixels − degenerate)` in Pillow's order of float32 operations.

    Args:
        degenerate: float32, broadcastable to the pixels, whole numbers: the result at factor 0.
        pixels: float32 `[B, 3, H, W]`, whole numbers 0..255; overwritten.
        factor: one for all, or float32 `[B]`, at least 0; above 1 extrapolates.

    Returns:
        float32 `[B, 3, H, W]`, clipped to 0..255, fractions still to be cut off.
    """
    return pixels.sub_(degenerate).mul_(per_image(factor)).add_(degenerate).clamp_(0, 255)


def grey(pixels: Tensor) -> Tensor:
    """ITU-R 601 luma as Pillow's convert("L"), which is ⌊(19595 R + 38470 G + 7471 B + 2¹⁵)/2¹⁶⌋.

    float32 `[B, 3, H, W]`, whole numbers 0..255, to the same, `[B, 1, H, W]`. Exact: every sum has
    at most 24 bits, float32's significand.
    """
    red, green, blue = pixels.unbind(1)
    luma = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536)
    return luma.add_(blue, alpha=7471 / 65536).add_(0.5).floor_().unsqueeze(1)


def mean_grey(luma: Tensor) -> Tensor:
    """The mean of each image's grey `[B, 1, H, W]`, rounded: float32 `[B, 1, 1, 1]`."""
    count = luma.shape[2] * luma.shape[3]
    # A row's sum is exact in float32, an image's need not be.
    total = luma.sum(dim=3, keepdim=True).to(torch.int64).sum(dim=2, keepdim=True)
    # int(total / count + 0.5) without leaving the integers, so that no device rounds differently.
    mean = torch.div(total + count // 2, count, rounding_mode="floor")
    return mean.to(torch.float32)


# The four adjustments of ColorJitter work in place on levels 0..255, `[B, 3, H, W]`: int16, or
# uint8 where they are compiled.


def brightness_(levels: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Brightness; `factor` one for all or float32 `[B]`, at least 0."""
    return levels.copy_(levels.to(torch.float32).mul_(per_image(factor)).clamp_(max=255))


def contrast_(levels: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Contrast: from `factor` 0, the mean grey rounded to an integer, to 1.

    Arguments as in `brightness_`.
    """
    pixels = levels.to(torch.float32)
    return levels.copy_(blend(mean_grey(grey(pixels)), pixels, factor))


def saturation_(levels: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Color: from `factor` 0, grey, to 1. Arguments as in `brightness_`."""
    pixels = levels.to(torch.float32)
    return levels.copy_(blend(grey(pixels), pixels, factor))


def hue_(levels: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by `shift` (float32 `[B]`, −0.5..0.5 turns), keeping HSV value and saturation.

    The exact result rounded to whole levels, where Pillow's HSV has 8 bits a channel: for turns
    within ±0.1, 98 % of all colours and turns are within 6 levels of Pillow's, the farthest 18.
    """
    # Hue in sextants times the chroma C = max − min is a sum of channels, with no division: from
    # pure red a colour is max − 2 min + (red + green + blue) − 2 red away, on the side given by the
    # sign of green − blue. `turn` is added, and at a distance d around the circle of 6C the new red
    # is min + clamp(2C − d, 0, C). Green and blue likewise. All but the turn are whole levels, so
    # rounding it rounds the result.
    red, green, blue = levels.to(levels_type()).unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    turn = (chroma.to(torch.float32) * (6 * shift[:, None, None])).round_().to(red.dtype)
    base = (red + green).add_(blue).add_(top).sub_(low, alpha=2)
    low.sub_(chroma)
    turned = []
    for channel, next_one, last_one in (red, green, blue), (green, blue, red), (blue, red, green):
        distance = torch.sub(base, channel, alpha=2)
        opposite = (next_one - last_one).clamp_(-1, 0)  # −1 or 0
        distance.addcmul_(distance, opposite, value=2).add_(turn).abs_()
        # Beyond 3C the circle comes back: 3C − d = |3C − distance|, which is limited to C..2C.
        distance.sub_(chroma, alpha=3).abs_().clamp_(chroma, 2 * chroma)
        turned.append(distance.add_(low))
    return levels.copy_(torch.stack(turned, 1))


class ColorJitter(Augmentation):
    """torchvision's ColorJitter, with an order and factors of its own for each image.

    Args:
        brightness, contrast, saturation: factors are within 1 ± this, and at least 0.
        hue: the shift is within ± this (0..0.5 turns of the colour circle).
        probability: of an image to be jittered at all.
    """

    columns = 8  # order of the four adjustments (−1: none), then their four parameters

    def __init__(
        self,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        probability: float,
    ) -> None:
        spread = torch.tensor([brightness, contrast, saturation, hue])
        centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
        lowest = torch.tensor([0.0, 0.0, 0.0, -math.inf])
        self.low = torch.maximum(centre - spread, lowest)
        self.high = centre + spread
        self.probability = probability
        self.jitter = jittered
        self.adjustments: Sequence[Callable[[Tensor, Tensor], Tensor]] = ADJUSTMENTS
        self.work_type = torch.int16

    def compile(self) -> None:
        self.jitter = torch.compile(jittered)
        compiled = [torch.compile(function, dynamic=True) for function in ADJUSTMENTS]
        self.adjustments = [partial(_on_copy, function) for function in compiled]
        self.work_type = torch.uint8

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        order = torch.rand(batch, 4, generator=generator).argsort(dim=1)
        skipped = torch.rand(batch, 1, generator=generator) >= self.probability
        parameters = torch.rand(batch, 4, generator=generator)
        parameters = self.low + (self.high - self.low) * parameters
        return torch.cat([order.masked_fill(skipped, -1).to(torch.float32), parameters], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        if not draws.is_on_cpu:
            return self.jitter(images, send(jitter_parameters(draws.host), images.device))
        parameters = draws.device[:, 4:].unbind(1)
        functions = [
            partial(_adjust, adjustment, parameter)
            for adjustment, parameter in zip(self.adjustments, parameters, strict=True)
        ]
        groups = draws.host[:, :4].to(torch.int64)
        return apply_in_groups(images.to(self.work_type), groups, functions).to(torch.uint8)


ADJUSTMENTS = (brightness_, contrast_, saturation_, hue_)


# On a GPU what counts is how many kernels are started: there every image goes through the same
# steps, and those that it did not draw leave it as it is.


def jitter_parameters(draws: Tensor) -> Tensor:
    """What `jittered` needs of ColorJitter's draws `[B, 8]`: float32 `[14, B]`, on the CPU.

    For each of the four steps the factor, then the weight of the mean grey (1 where contrast is
    adjusted), then that of the grey (1 where saturation is); then the two shifts of the hue.
    """
    order, parameters = draws[:, :4].to(torch.int64), draws[:, 4:]
    is_factor = (order >= 0) & (order < 3)
    factor = parameters.gather(1, order.clamp(min=0)).where(is_factor, 1)
    hue = parameters[:, 3:] * (order == 3).unflatten(1, (2, 2)).any(2)
    return torch.cat([factor, order == 1, order == 2, hue], dim=1).t()


def jittered(images: Tensor, parameters: Tensor) -> Tensor:
    """ColorJitter with one sequence of steps for all images; equal to the drawn order.

    Step 1, hue, steps 2 and 3, hue, step 4. A hue drawn first or second is shifted after step 1, a
    hue drawn third or fourth after step 3; its own step changes nothing, so the order is kept.

    Args:
        images: uint8 `[B, 3, H, W]`.
        parameters: by `jitter_parameters`, on the images' device.

    Returns:
        uint8 `[B, 3, H, W]`.
    """
    factors, means, greys, (first_hue, second_hue) = parameters.split([4, 4, 4, 2])
    levels = images.to(torch.float32)
    for step in range(4):
        luma = grey(levels)
        mean = per_image(means[step]) * mean_grey(luma)
        degenerate = torch.addcmul(mean, per_image(greys[step]), luma)
        levels = blend(degenerate, levels, factors[step]).floor_()
        if step == 0:
            levels = shifted_hue(levels, first_hue)
        if step == 2:
            levels = shifted_hue(levels, second_hue)
    return levels.to(torch.uint8)


def shifted_hue(levels: Tensor, shift: Tensor) -> Tensor:
    """`hue_` in half as many kernels, not in place.

    float32 whole levels `[B, 3, H, W]`, and shifts `[B]`, in turns of the colour circle.
    """
    low, top = torch.aminmax(levels, dim=1, keepdim=True)
    chroma = top - low
    turn = (chroma * per_image(6 * shift)).round_()
    base = levels.sum(1, keepdim=True).add_(top).sub_(low, alpha=2)
    distance = torch.sub(base, levels, alpha=2)
    opposite = levels.roll(-1, 1).sub_(levels.roll(1, 1)).clamp_(-1, 0)
    distance.addcmul_(distance, opposite, value=2).add_(turn).abs_()
    distance.sub_(chroma, alpha=3).abs_().clamp_(chroma, 2 * chroma)
    return distance.add_(low.sub_(chroma))


def _adjust(
    adjustment: Callable[[Tensor, Tensor], Tensor],
    parameter: Tensor,
    levels: Tensor,
    rows: Tensor,
    turn: int,
) -> Tensor:
    return adjustment(levels, parameter.index_select(0, rows))


def _on_copy(
    adjustment: Callable[[Tensor, Tensor], Tensor], levels: Tensor, parameter: Tensor
) -> Tensor:
    # A copy starts at offset 0 and is aligned, so that code is compiled once.
    return adjustment(levels.clone(), parameter)


def three_grey(images: Tensor) -> Tensor:
    """Each image's grey three times, as Pillow: uint8 `[B, 3, H, W]` to the same."""
    return to_uint8(grey(images.to(torch.float32))).expand_as(images)


class RandomGrey(Augmentation):
    """Turn an image to grey with this probability; three equal channels."""

    columns = 1  # 0: turned to grey, −1: not

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.turn_grey = three_grey

    def compile(self) -> None:
        self.turn_grey = torch.compile(three_grey, dynamic=True)

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return draw_chosen(batch, self.probability, generator)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        if not draws.is_on_cpu:
            is_grey = per_image(draws.device[:, 0] == 0)
            return torch.where(is_grey, self.turn_grey(images), images)
        groups = draws.host.to(torch.int64)
        return apply_in_groups(images, groups, [lambda part, rows, turn: self.turn_grey(part)])
