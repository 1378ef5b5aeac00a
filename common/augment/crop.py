"""Crops, resizing and flips, resampled as Pillow does."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.augment.base import (
    Augmentation,
    Draws,
    apply_in_groups,
    draw_chosen,
    per_image,
    to_uint8,
)


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1).clamp_(min=0)


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
    pixel = torch.arange(source, device=device)[None, None, :] + 0.5
    centre = start[:, None, None] + output * scale
    weights = KERNELS[kernel]((pixel - centre).abs_().div_(width))
    inside = (pixel > low[:, None, None]) & (pixel < high[:, None, None])
    weights.mul_(inside.to(torch.float32))
    return weights.div_(weights.sum(2, keepdim=True))


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample uint8 `[B, 3, H, W]` by weights `[B, h, H]` and `[B, w, W]` to `[B, 3, h, w]`.

    Weights `[1, …]` are used for all images.

    Along x, then along y, rounded and clipped to 0..255 after each, as Pillow does: equal, but for
    values within float32's rounding of a half (1, rarely 2 apart). Pillow from 13 on takes
    y first for tall crops that shrink: there bilinear is up to 2 apart, bicubic at sharp edges 32.
    """
    rows = rows.expand(len(images), -1, -1)
    columns = columns.expand(len(images), -1, -1)
    if images.device.type != "cpu":
        return _resample(images, rows, columns).contiguous()
    # In parts that fit into the caches: half the time of 1,024 images of 32 px at once.
    at_once = max(1, 2**17 // (images.shape[2] * images.shape[3]))
    parts = zip(images.split(at_once), rows.split(at_once), columns.split(at_once), strict=True)
    return torch.cat([_resample(*part) for part in parts])


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    batch, channels, height, width = images.shape
    new_height, new_width = rows.shape[1], columns.shape[1]
    # One product an image, not one a channel: all its rows side by side, then all its columns.
    pixels = images.to(torch.float32).reshape(batch, channels * height, width)
    pixels = torch.bmm(pixels, columns.transpose(1, 2)).add_(0.5).floor_().clamp_(0, 255)
    pixels = pixels.view(batch, channels, height, new_width).transpose(1, 2)
    pixels = pixels.reshape(batch, height, channels * new_width)
    pixels = to_uint8(torch.bmm(rows, pixels).add_(0.5).clamp_(0, 255))
    return pixels.view(batch, new_height, channels, new_width).transpose(1, 2)


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
        flipped = flip > 0
        # Both axes at once. Weights of the shorter one beyond its end are 0, since pixels there are
        # outside the crop.
        weights = resize_weights(
            torch.cat([top, torch.where(flipped, left + width, left)]),
            torch.cat([height, torch.where(flipped, -width, width)]),
            torch.cat([top, left]),
            torch.cat([top + height, left + width]),
            max(images.shape[2:]),
            self.size,
            self.kernel,
        )
        rows, columns = weights.chunk(2)
        rows, columns = rows[..., : images.shape[2]], columns[..., : images.shape[3]]
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
    area = torch.empty(batch, tries).uniform_(*scale, generator=generator)
    log_ratio = torch.empty(batch, tries).uniform_(*map(math.log, ratio), generator=generator)
    place = torch.rand(batch, 2, generator=generator)
    # NumPy, whose calls cost a third of torch's on the few numbers of a photograph's crops.
    limits = np.array(size, dtype=np.float32)
    # numpy below 2 makes float64 of float32 times an integer above 65,535.
    area, aspect = area.numpy() * np.float32(height * width), np.exp(log_ratio.numpy())
    crops = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=2)))  # height, width
    fits = ((crops > 0) & (crops <= limits)).all(axis=2)
    crop = crops[np.arange(batch), fits.argmax(axis=1)]
    corner = np.floor(place.numpy() * (limits - crop + 1))
    boxes = np.concatenate([corner, crop], axis=1)
    missed = ~fits.any(axis=1)
    if missed.any():
        # The fallback: the whole image, cut in the middle to the nearest allowed aspect ratio.
        longest = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
        middle = (height - longest[0]) // 2, (width - longest[1]) // 2
        boxes[missed] = (*middle, *longest)
    return torch.from_numpy(boxes)


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


class RandomFlip(Augmentation):
    """Mirror an image left to right with this probability."""

    columns = 1  # 0: flipped, −1: not

    def __init__(self, probability: float = 0.5) -> None:
        self.probability = probability

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return draw_chosen(batch, self.probability, generator)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        if not draws.is_on_cpu:
            return torch.where(per_image(draws.device[:, 0] == 0), images.flip(3), images)
        groups = draws.host.to(torch.int64)
        return apply_in_groups(images, groups, [lambda part, rows, turn: part.flip(3)])
