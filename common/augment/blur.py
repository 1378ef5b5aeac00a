"""Gaussian blur, each image with its own sigma."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.augment.base import (
    Augmentation,
    Draws,
    apply_in_groups,
    draw_chosen,
    per_image,
    to_uint8,
)


def convolved(pixels: Tensor, weights: Tensor) -> Tensor:
    """Convolve the inside of padded images along both axes.

    Args:
        pixels: float32 `[B, 3, H + 2·radius, W + 2·radius]`.
        weights: float32 `[B, 2·radius + 1]`, symmetric.

    Returns:
        uint8 `[B, 3, H, W]`.
    """
    # Each channel of each image is a group of its own: a depthwise convolution of one big image.
    groups = pixels.shape[0] * pixels.shape[1]
    kernels = weights.repeat_interleave(pixels.shape[1], dim=0)[:, None]  # [B·3, 1, 2·radius + 1]
    image = pixels.view(1, groups, *pixels.shape[2:])
    image = F.conv2d(image, kernels[:, :, None, :], groups=groups)
    image = F.conv2d(image, kernels[:, :, :, None], groups=groups)
    return to_uint8(image.add_(0.5)).view(*pixels.shape[:2], *image.shape[2:])


def shifted_sums(pixels: Tensor, weights: Tensor) -> Tensor:
    """`convolved` as sums of shifted images, which compile to one loop over the pixels an axis."""
    radius = weights.shape[1] // 2
    for axis in (2, 3):
        length = pixels.shape[axis] - 2 * radius
        total = pixels.narrow(axis, radius, length) * per_image(weights[:, radius])
        for near in range(radius):
            one = pixels.narrow(axis, near, length)
            other = pixels.narrow(axis, 2 * radius - near, length)
            total = total + (one + other) * per_image(weights[:, near])
        pixels = total
    return to_uint8(pixels + 0.5)


def gaussian_blur(
    images: Tensor,
    sigma: Tensor,
    radius: int,
    convolve: Callable[[Tensor, Tensor], Tensor] = convolved,
) -> Tensor:
    """Convolve each image with its own Gaussian, exp(−d²/2σ²) for |d| ≤ radius, normalised.

    Along one axis, then the other, in float32, rounded once at the end: within rounding of the
    exact sum.

    Args:
        images: uint8 `[B, 3, H, W]`; the outermost pixels are repeated beyond the border.
        sigma: float32 `[B]`, above 0, in pixels.
        radius: of the kernel, in pixels, the same for all.
        convolve: `convolved`, or a compiled `shifted_sums`.

    Returns:
        uint8 `[B, 3, H, W]`.
    """
    distance = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights /= weights.sum(1, keepdim=True)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    pixels = F.pad(pixels, (radius, radius, radius, radius), mode="replicate")
    return convolve(pixels, weights)


class GaussianBlur(Augmentation):
    """Blur an image with this probability by a Gaussian whose σ is drawn for it uniformly.

    Args:
        sigma: least and greatest σ, in pixels, above 0. An image's kernel reaches 4σ at least.
        probability: of an image to be blurred at all.

    Pillow's `ImageFilter.GaussianBlur(σ)` approximates the Gaussian by three box filters along each
    axis, rounds to 8 bits after each and repeats the border anew for each. From it this differs by
    less than 0.5 levels on average in photographs of 64 px or more. At most, in patterns of black
    and white pixels, it is 43 levels for σ near 0.3 (where the boxes blur more), 17 from σ = 0.9
    on, and 52 within 6 pixels of the border.
    """

    columns = 2  # 0: blurred, −1: left; σ

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), probability: float = 0.5) -> None:
        self.sigma = sigma
        self.probability = probability
        # Small kernels are cheaper: images go in groups by the radius that their σ needs.
        self.radii = range(4, math.ceil(4 * sigma[1]) + 4, 4)
        self.convolve = convolved

    def compile(self) -> None:
        # Once for each radius and for groups of one image; torch falls back beyond eight times.
        self.convolve = torch.compile(shifted_sums, dynamic=True)

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        group = draw_chosen(batch, self.probability, generator)
        sigma = torch.empty(batch, 1).uniform_(*self.sigma, generator=generator)
        return torch.cat([group, sigma], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        chosen, sigma = draws.host.unbind(1)
        group = (sigma.ceil() - 1).where(chosen == 0, -1).to(torch.int64)
        functions = [partial(self._blurred, draws.device[:, 1], radius) for radius in self.radii]
        return apply_in_groups(images, group[:, None], functions)

    def _blurred(
        self, sigma: Tensor, radius: int, images: Tensor, rows: Tensor, turn: int
    ) -> Tensor:
        return gaussian_blur(images, sigma.index_select(0, rows), radius, self.convolve)
