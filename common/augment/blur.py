"""Gaussian blur, each image with its own sigma, equal to Pillow's to the bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.augment.base import Augmentation, Draws, draw_chosen
from common.runtime.ranks import send

PASSES = 3
REACH = 2  # the widest box extends so many pixels to either side
ONE = 2**24  # weights are fixed-point numbers, this one being 1


def box_weights(sigma: Tensor) -> Tensor:
    """The box filter of which three passes make Pillow's `ImageFilter.GaussianBlur(σ)`.

    A box is a few pixels of equal weight, and one of less at either end, such that three boxes have
    the Gaussian's variance (Gwosdek et al., "Theoretical foundations of Gaussian convolution by
    extended box filtering", equations 7, 11 and 14).

    Args:
        sigma: float32 `[B]` on the CPU, in pixels, above 0 and at most 2.

    Returns:
        int32 `[4, B]`: weights of a pixel itself, of the two next to it and of the two after these;
        and what to add before the shift by 24 bits, when levels are −128..127.
    """
    # The types of Pillow's C code, since its roundings decide about the weights' last bits.
    single, double = np.float32, np.float64
    variance = sigma.numpy() ** 2 / single(PASSES)
    length = np.sqrt(12.0 * variance.astype(double) + 1.0).astype(single)
    whole = np.floor((length.astype(double) - 1.0) / 2.0).astype(single)
    after = whole + single(1)
    end = (single(2) * whole + single(1)) * (whole * after - single(3) * variance)
    end = end / (single(6) * (variance - after * after))
    radius = whole.astype(np.int64)  # 0 or 1: a box of 1 or 3 pixels, and its ends
    full = (single(ONE) / ((whole + end) * single(2) + single(1))).astype(np.int64)
    last = (ONE - (2 * radius + 1) * full) // 2
    near, far = np.where(radius == 0, last, full), np.where(radius == 0, 0, last)
    # Half a level for rounding. The weights' sum may be below 1, of which 128 levels show a part.
    extra = ONE // 2 - 128 * (ONE - (full + 2 * near + 2 * far))
    return torch.from_numpy(np.stack([full, near, far, extra]).astype(np.int32))


def box_blur(images: Tensor, weights: Tensor, is_wide: bool) -> Tensor:
    """Three box filters along each axis, rounded to whole levels after each.

    Beyond the border each box repeats the outermost pixels of what the one before it made.

    Args:
        images: uint8 `[B, 3, H, W]`.
        weights: int32 `[4, B]`, by `box_weights`, on the images' device.
        is_wide: whether any weight of the farthest pixels is above 0.

    Returns:
        uint8 `[B, 3, H, W]`.
    """
    # −128..127, so that a pixel's weighted sum fits into an int32.
    levels = images.to(torch.int32, memory_format=torch.contiguous_format).sub_(128)
    for axis in (3, 2):
        levels = _boxes_along(axis, levels, weights[:, :, None], is_wide)
    return levels.add(128).to(torch.uint8)


def _boxes_along(axis: int, levels: Tensor, weights: Tensor, is_wide: bool) -> Tensor:
    full, near, far, extra = weights
    length = levels.shape[axis]
    shape = list(levels.shape)
    shape[axis] += 2 * REACH
    padded, result = levels.new_empty(shape), levels.new_empty(shape)
    padded.narrow(axis, REACH, length).copy_(levels)
    # Neighbours along the axis are `step` numbers apart in memory: contiguous stretches of it are
    # added, which is fast. What this computes in the margin is overwritten.
    step = padded.stride(axis)
    count = padded[0].numel() - 2 * REACH * step
    for _ in range(PASSES):
        for start, edge in ((0, REACH), (REACH + length, REACH + length - 1)):
            padded.narrow(axis, start, REACH).copy_(padded.narrow(axis, edge, 1))
        pixels = padded.flatten(1)
        taps = [pixels.narrow(1, index * step, count) for index in range(2 * REACH + 1)]
        total = result.flatten(1).narrow(1, REACH * step, count)
        total.copy_(taps[1]).add_(taps[3]).mul_(near).addcmul_(taps[2], full)
        if is_wide:
            total.addcmul_(taps[0] + taps[4], far)
        total.add_(extra).bitwise_right_shift_(24)
        padded, result = result, padded
    return padded.narrow(axis, REACH, length)


class GaussianBlur(Augmentation):
    """Blur an image with this probability by a Gaussian whose σ is drawn for it uniformly.

    Equal to Pillow's `ImageFilter.GaussianBlur(σ)`.

    Args:
        sigma: least and greatest σ, in pixels, above 0 and at most 2.
        probability: of an image to be blurred at all.

    Raises:
        ValueError: for other σ, whose boxes may be wider.
    """

    columns = 2  # 0: blurred, −1: not; σ

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), probability: float = 0.5) -> None:
        if not 0 < sigma[0] <= sigma[1] <= 2:
            raise ValueError(f"GaussianBlur needs σ with 0 < least ≤ greatest ≤ 2, not {sigma}")
        self.sigma = sigma
        self.probability = probability

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        group = draw_chosen(batch, self.probability, generator)
        sigma = torch.empty(batch, 1).uniform_(*self.sigma, generator=generator)
        return torch.cat([group, sigma], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        chosen, sigma = draws.host.unbind(1)
        weights = box_weights(sigma)
        if not draws.is_on_cpu:
            unchanged = torch.tensor([[ONE], [0], [0], [ONE // 2]], dtype=torch.int32)
            weights = weights.where(chosen == 0, unchanged)
            return box_blur(images, send(weights, images.device), True)
        # One by one: an image and its sums fit into a core's cache.
        blurred = images.clone()
        for index in (chosen == 0).nonzero().flatten().tolist():
            own = slice(index, index + 1)
            is_wide = bool(weights[2, index])
            blurred[own] = box_blur(images[own], weights[:, own], is_wide)
        return blurred
