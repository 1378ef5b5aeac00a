"""Batched augmentation of 8-bit images, every random choice drawn per image.

Images are uint8 `[B, 3, H, W]` tensors on any device. An `Augmentation` works in two steps, so that
a step's randomness can be drawn once for the global batch, cut by rank and sent to the device:

    draws = augmentation.draw(batch, size, generator)      # CPU float32 [batch, columns]
    views = augmentation.apply(images, Draws.of(draws[rows], images.device))

`augmentation(images, generator)` does both. Arithmetic follows Pillow, whose 8-bit results define
these operations in the authors' code; where a function deviates, its docstring says by how much.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from common.distributed import send


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 numbers on the device, sent once: sending them each step would make it wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Draws(NamedTuple):
    """Random numbers of a batch, float32 `[B, columns]`, on the CPU and on the images' device.

    Decisions that pick which code runs are read from the CPU copy, so that no step waits for the
    device; continuous parameters are read from the device copy.
    """

    host: Tensor
    device: Tensor

    @classmethod
    def of(cls, draws: Tensor, device: torch.device | str = "cpu") -> Draws:
        return cls(draws, send(draws, torch.device(device)))

    def columns(self, start: int, stop: int) -> Draws:
        return Draws(self.host[:, start:stop], self.device[:, start:stop])


class Augmentation(ABC):
    """A batched random map of uint8 images `[B, 3, H, W]`; see the module's docstring."""

    columns: int  # how many random numbers one image takes

    @abstractmethod
    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw for `batch` images of `size` (height, width): CPU float32 `[batch, columns]`."""

    @abstractmethod
    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment uint8 images `[B, 3, H, W]` by draws `[B, columns]`; the input is not changed."""

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that images of `size` (height, width) come out with."""
        return size

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw from a CPU generator and apply: uint8 `[B, 3, H, W]` in and out."""
        draws = self.draw(len(images), (images.shape[2], images.shape[3]), generator)
        return self.apply(images, Draws.of(draws, images.device))


class Chain(Augmentation):
    """Augmentations one after another."""

    def __init__(self, *augmentations: Augmentation) -> None:
        self.augmentations = augmentations
        self.columns = sum(augmentation.columns for augmentation in augmentations)

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        drawn = []
        for augmentation in self.augmentations:
            drawn.append(augmentation.draw(batch, size, generator))
            size = augmentation.output_size(size)
        return torch.cat(drawn, dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        start = 0
        for augmentation in self.augmentations:
            stop = start + augmentation.columns
            images = augmentation.apply(images, draws.columns(start, stop))
            start = stop
        return images

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        for augmentation in self.augmentations:
            size = augmentation.output_size(size)
        return size


def apply_in_groups(
    images: Tensor, group: Tensor, functions: Sequence[Callable[[Tensor, Tensor], Tensor]]
) -> Tensor:
    """Send each image through the function of its group, each function called once.

    Sorting by group turns a choice per image into a few calls on contiguous slices.

    Args:
        images: uint8 `[B, 3, H, W]`.
        group: integer `[B]` on the CPU: an index of `functions`, or -1 to leave the image as it is.
        functions: called with that group's images and their indices in the batch (int64, on the
            images' device); return images of the same shape.
    """
    order = group.argsort(stable=True)
    counts = torch.bincount(group + 1, minlength=len(functions) + 1).tolist()
    rows = send(order, images.device)
    images = images[rows]
    start = counts[0]
    for function, count in zip(functions, counts[1:], strict=True):
        if count:
            part = slice(start, start + count)
            images[part] = function(images[part], rows[part])
            start += count
    return images[send(order.argsort(), images.device)]


def to_uint8(images: Tensor) -> Tensor:
    """Cut floating-point values within 0..255 off to uint8."""
    # By way of int16, which is several times faster on CPUs than the direct cast.
    return images.to(torch.int16).to(torch.uint8)


def per_image(value: float | Tensor) -> float | Tensor:
    """Shape a value per image, `[B]`, to broadcast over `[B, C, H, W]`; a float passes."""
    return value[:, None, None, None] if isinstance(value, Tensor) else value


def blend(degenerate: Tensor, images: Tensor, factor: float | Tensor) -> Tensor:
    """`degenerate + factor · (images − degenerate)` in Pillow's order of float32 operations.

    Args:
        degenerate: integer or float, broadcastable to the images: the result at factor 0.
        images: uint8 `[B, 3, H, W]`.
        factor: one for all, or float32 `[B]`, at least 0; above 1 extrapolates.

    Returns:
        uint8 `[B, 3, H, W]`, clipped to 0..255, fractions cut off.
    """
    start = degenerate.to(torch.float32)
    blended = (images.to(torch.float32) - start).mul_(per_image(factor)).add_(start)
    return to_uint8(blended.clamp_(0, 255))


def grey(images: Tensor) -> Tensor:
    """ITU-R 601 luma as Pillow's convert("L"): uint8 `[B, 3, H, W]` to int32 `[B, 1, H, W]`."""
    red, green, blue = images.to(torch.int32).unbind(1)
    luma = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(32768)
    return luma.bitwise_right_shift_(16).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Brightness; `factor` one for all or float32 `[B]`."""
    return to_uint8(images.to(torch.float32).mul_(per_image(factor)).clamp_(max=255))


def adjust_contrast(images: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Contrast: away from the image's mean grey, rounded to an integer."""
    pixels = images.shape[2] * images.shape[3]
    total = grey(images).sum(dim=(1, 2, 3))
    # int(total / pixels + 0.5) without leaving the integers, so that no device rounds differently.
    mean = torch.div(2 * total + pixels, 2 * pixels, rounding_mode="floor")
    return blend(mean[:, None, None, None], images, factor)


def adjust_saturation(images: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Color: away from the image's grey."""
    return blend(grey(images), images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (float32 `[B]`, −0.5..0.5 turns), keeping HSV value and saturation.

    Computed in float32 and rounded, where Pillow's HSV has 8 bits a channel: for turns within ±0.1,
    98 % of all colours and turns come out within 6 levels of Pillow's, the farthest 18.
    """
    channels = images.to(torch.float32)
    red, green, blue = channels.unbind(1)
    top = channels.amax(1)
    chroma = top - channels.amin(1)
    # Each test selects the sextant by which channel is the largest; grey pixels (chroma 0) have no
    # hue and come out unchanged whatever sextant they are given.
    scale = 1 / chroma.clamp(min=1)
    from_red = (green - blue) * scale
    from_green = (blue - red) * scale + 2
    from_blue = (red - green) * scale + 4
    hue = torch.where(top == red, from_red, torch.where(top == green, from_green, from_blue))
    hue = hue + 6 * shift[:, None, None]
    turned = torch.empty_like(channels)
    # f(n) = V − C·max(0, min(k, 4 − k, 1)), k = (n + hue) mod 6, for n = 5, 3, 1
    for channel, offset in enumerate((5, 3, 1)):
        k = torch.remainder(hue + offset, 6)
        turned[:, channel] = top - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return to_uint8(turned.add_(0.5))


class ColorJitter(Augmentation):
    """torchvision's ColorJitter with an own order and own factors for each image.

    Args:
        brightness, contrast, saturation: factors lie in 1 ± this, at least 0.
        hue: the turn lies in ± this (0..0.5 turns).
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

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        order = torch.rand(batch, 4, generator=generator).argsort(dim=1)
        skipped = torch.rand(batch, 1, generator=generator) >= self.probability
        parameters = torch.rand(batch, 4, generator=generator)
        parameters = self.low + (self.high - self.low) * parameters
        return torch.cat([order.masked_fill(skipped, -1).to(torch.float32), parameters], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        brightness, contrast, saturation, hue = draws.device[:, 4:].unbind(1)
        adjustments = (
            lambda part, rows: adjust_brightness(part, brightness[rows]),
            lambda part, rows: adjust_contrast(part, contrast[rows]),
            lambda part, rows: adjust_saturation(part, saturation[rows]),
            lambda part, rows: adjust_hue(part, hue[rows]),
        )
        for group in draws.host[:, :4].to(torch.int64).unbind(1):
            images = apply_in_groups(images, group, adjustments)
        return images


def draw_chosen(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """0 with this probability, else −1: float32 `[batch, 1]`, for `apply_in_groups`."""
    left = torch.rand(batch, 1, generator=generator) >= probability
    return -left.to(torch.float32)


class RandomGrey(Augmentation):
    """Turn an image to grey with this probability; three equal channels, as Pillow."""

    columns = 1  # 0: turned to grey, −1: left

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return draw_chosen(batch, self.probability, generator)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        group = draws.host[:, 0].to(torch.int64)
        return apply_in_groups(images, group, [lambda part, rows: grey(part).expand_as(part)])


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    # Keys' kernel with a = −0.5, Pillow's choice
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _triangle, "bicubic": _cubic}


def resize_weights(
    start: Tensor, length: Tensor, low: Tensor, high: Tensor, source: int, size: int, kernel: str
) -> Tensor:
    """Weights that resample part of one axis, antialiased as Pillow does it.

    Args:
        start, length: float32 `[B]`, in source pixels: the stretch that becomes `size` pixels.
            A negative length runs backwards from `start`: a flip.
        low, high: float32 `[B]`: source pixels outside low..high (exclusive) take no part.
        source, size: pixels before and after.
        kernel: "bilinear" or "bicubic".

    Returns:
        float32 `[B, size, source]`, each row summing to 1.
    """
    device = start.device
    scale = (length / size)[:, None, None]
    width = scale.abs().clamp(min=1)  # a kernel never narrower than a source pixel: antialiasing
    output = torch.arange(size, device=device)[None, :, None] + 0.5
    pixel = torch.arange(source, device=device)[None, None, :]
    centre = start[:, None, None] + output * scale
    weights = KERNELS[kernel]((pixel + 0.5 - centre).abs_().div_(width))
    weights *= (pixel >= low[:, None, None]) & (pixel < high[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample uint8 `[B, 3, H, W]` by weights `[B, h, H]` and `[B, w, W]` to `[B, 3, h, w]`.

    Along x, then along y, rounded and clipped to 0..255 after each, as Pillow does: equal, but for
    values that lie within float32's rounding of a half (1, rarely 2 apart). Pillow from 13 on takes
    y first for tall crops that shrink: there bilinear is up to 2 apart, bicubic at sharp edges 32.
    """
    pixels = torch.matmul(images.to(torch.float32), columns[:, None].transpose(2, 3))
    pixels.add_(0.5).floor_().clamp_(0, 255)
    pixels = torch.matmul(rows[:, None], pixels)
    return to_uint8(pixels.add_(0.5).clamp_(0, 255))


class RandomResizedCropFlip(Augmentation):
    """torchvision's RandomResizedCrop (aspect ratio 3/4..4/3), then a horizontal flip with p ½.

    Args:
        size: height and width of the result, pixels.
        scale: least and greatest area of the crop, as a share of the image's.
        kernel: "bilinear" or "bicubic".
    """

    columns = 5  # top, left, height, width of the crop in pixels; 1 where flipped

    def __init__(self, size: int, scale: tuple[float, float], kernel: str = "bilinear") -> None:
        self.size = size
        self.scale = scale
        self.kernel = kernel

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.size, self.size

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        boxes = draw_crops(batch, size, self.scale, generator)
        flip = torch.rand(batch, 1, generator=generator) < 0.5
        return torch.cat([boxes, flip], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        top, left, height, width, flip = draws.device.unbind(1)
        rows = resize_weights(
            top, height, top, top + height, images.shape[2], self.size, self.kernel
        )
        flipped = flip > 0
        columns = resize_weights(
            torch.where(flipped, left + width, left),
            torch.where(flipped, -width, width),
            left,
            left + width,
            images.shape[3],
            self.size,
            self.kernel,
        )
        return resample(images, rows, columns)


def draw_crops(
    batch: int, size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Draw torchvision's RandomResizedCrop boxes, ten tries an image, then its central fallback.

    Args:
        size: height and width of the images, pixels.
        scale: least and greatest area of a crop, as a share of the image's.

    Returns:
        float32 `[batch, 4]`: top, left, height, width, whole pixels.
    """
    tries, ratio = 10, (3 / 4, 4 / 3)
    height, width = size
    area = torch.empty(batch, tries).uniform_(*scale, generator=generator) * (height * width)
    log_ratio = torch.empty(batch, tries).uniform_(*map(math.log, ratio), generator=generator)
    aspect = log_ratio.exp_()
    crop_width = (area * aspect).sqrt_().round_()
    crop_height = (area / aspect).sqrt_().round_()
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    crop_width, crop_height = crop_width.gather(1, first), crop_height.gather(1, first)
    # The fallback: the whole image, cut to the nearest allowed aspect ratio.
    fallback_width = min(width, round(height * ratio[1]))
    fallback_height = min(height, round(width / ratio[0]))
    found = fits.any(dim=1, keepdim=True)
    crop_width = torch.where(found, crop_width, fallback_width)
    crop_height = torch.where(found, crop_height, fallback_height)
    place = torch.rand(batch, 2, generator=generator)
    top = torch.where(
        found,
        (place[:, :1] * (height - crop_height + 1)).floor_(),
        (height - crop_height).div(2, rounding_mode="floor"),
    )
    left = torch.where(
        found,
        (place[:, 1:] * (width - crop_width + 1)).floor_(),
        (width - crop_width).div(2, rounding_mode="floor"),
    )
    return torch.cat([top, left, crop_height, crop_width], dim=1)


def resize_centre_crop(images: Tensor, resize: int, size: int, kernel: str) -> Tensor:
    """The evaluation view: resize square images to `resize`, cut the central `size` pixels.

    uint8 `[B, 3, S, S]` to `[B, 3, size, size]`.

    Raises:
        ValueError: if the images are not square, or `size` exceeds `resize`.
    """
    source = images.shape[2]
    if size > resize:
        raise ValueError(f"{size} pixels cannot be cut from {resize}")
    if images.shape[3] != source:
        raise ValueError(f"square images are needed, these are {tuple(images.shape[2:])}")
    # The central part of the resized image, expressed in source pixels.
    step = source / resize
    start = torch.tensor([round((resize - size) / 2) * step], device=images.device)
    length = torch.tensor([size * step], device=images.device)
    low, high = torch.zeros_like(start), torch.full_like(start, source)
    weights = resize_weights(start, length, low, high, source, size, kernel)
    return resample(images, weights, weights)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 `[B, 3, H, W]` to float32 `(x/255 − mean)/std`, in channels_last memory."""
    scale = constant(tuple(1 / (255 * s) for s in std), images.device)
    shift = constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), images.device)
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return pixels.mul_(scale[:, None, None]).add_(shift[:, None, None])
