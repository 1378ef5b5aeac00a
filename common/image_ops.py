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
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
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

    def stacked(self) -> Draws:
        """Of two views of each image: the first half of the columns, and below it the second."""
        return Draws(*(torch.cat(part.chunk(2, dim=1)) for part in self))


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

    def compile(self) -> None:  # noqa: B027 (for some there is nothing to compile)
        """From now on use `torch.compile` where it is faster, as `nn.Module.compile` does.

        On a CPU the images stay the same to the bit, but where a blurred value is within float32's
        rounding of a half, and what follows there.
        """

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

    def compile(self) -> None:
        for augmentation in self.augmentations:
            augmentation.compile()


def apply_in_groups(
    images: Tensor, groups: Tensor, functions: Sequence[Callable[[Tensor, Tensor, int], Tensor]]
) -> Tensor:
    """Send each image through the functions of its groups, turn by turn.

    In each turn the images lie sorted by group: a choice per image becomes a few calls on
    contiguous slices.

    Args:
        images: `[B, …]`.
        groups: integer `[B, turns]` on the CPU: an image's function in each turn, as an index of
            `functions`, or -1 to leave it as it is.
        functions: called with a group's images, their indices in the batch (int64, on the images'
            device) and the turn; return images of the same shape and type, or change them in place.
    """
    place = torch.arange(len(images))  # where each image of the batch lies
    for turn, group in enumerate(groups.unbind(1)):
        order = group.argsort(stable=True)
        counts = torch.bincount(group + 1, minlength=len(functions) + 1).tolist()
        # index_select, since on CPUs images[rows] takes ten times as long.
        images = images.index_select(0, send(place[order], images.device))
        place = order.argsort()
        rows = send(order, images.device)
        parts = zip(functions, images.split(counts)[1:], rows.split(counts)[1:], strict=True)
        for function, part, part_rows in parts:
            if len(part):
                part.copy_(function(part, part_rows, turn))
    return images.index_select(0, send(place, images.device))


def levels_type() -> torch.dtype:
    """The type that arithmetic on whole levels is done in: int16, or float32 while compiling.

    On CPUs floating point is reached and left in half the time from int16 that it takes from uint8.
    Compiled code has the casts for nothing, but no vectors of int16.
    """
    return torch.float32 if torch.compiler.is_compiling() else torch.int16


def to_uint8(images: Tensor) -> Tensor:
    """Cut values within 0..255 off to uint8."""
    return images.to(levels_type()).to(torch.uint8)


def per_image(value: float | Tensor) -> float | Tensor:
    """Shape a value per image, `[B]`, to broadcast over `[B, C, H, W]`; a float passes."""
    return value[:, None, None, None] if isinstance(value, Tensor) else value


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


# The four adjustments of ColorJitter work in place on levels 0..255, `[B, 3, H, W]`: int16, or
# uint8 where they are compiled.


def brightness_(levels: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Brightness; `factor` one for all or float32 `[B]`, at least 0."""
    return levels.copy_(levels.to(torch.float32).mul_(per_image(factor)).clamp_(max=255))


def contrast_(levels: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Contrast: away from the image's mean grey, rounded to an integer."""
    pixels = levels.to(torch.float32)
    count = levels.shape[2] * levels.shape[3]
    # A row's sum is exact in float32, an image's need not be.
    total = grey(pixels).sum(dim=3).to(torch.int64).sum(dim=(1, 2))
    # int(total / count + 0.5) without leaving the integers, so that no device rounds differently.
    mean = torch.div(2 * total + count, 2 * count, rounding_mode="floor")
    return levels.copy_(blend(per_image(mean.to(torch.float32)), pixels, factor))


def saturation_(levels: Tensor, factor: float | Tensor) -> Tensor:
    """Pillow's ImageEnhance.Color: away from the image's grey."""
    pixels = levels.to(torch.float32)
    return levels.copy_(blend(grey(pixels), pixels, factor))


def hue_(levels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (float32 `[B]`, −0.5..0.5 turns), keeping HSV value and saturation.

    The exact result rounded to whole levels, where Pillow's HSV has 8 bits a channel: for turns
    within ±0.1, 98 % of all colours and turns are within 6 levels of Pillow's, the farthest 18.
    """
    # Hue in sextants times the chroma C = max − min is a sum of channels, with no division: from
    # pure red a colour lies max − 2 min + (red + green + blue) − 2 red away, on the one side or the
    # other by the sign of green − blue. `turn` is added, and at a distance d around the circle of
    # 6C the new red is min + clamp(2C − d, 0, C). Green and blue likewise. All but the turn are
    # whole levels, so rounding it rounds the result.
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
        # Beyond 3C the circle comes back: 3C − d = |3C − distance|, which is to lie in C..2C.
        distance.sub_(chroma, alpha=3).abs_().clamp_(chroma, 2 * chroma)
        turned.append(distance.add_(low))
    return levels.copy_(torch.stack(turned, 1))


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
        self.adjustments: Sequence[Callable[[Tensor, Tensor], Tensor]] = ADJUSTMENTS
        self.work_type = torch.int16

    def compile(self) -> None:
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
        parameters = draws.device[:, 4:].unbind(1)
        functions = [
            partial(_adjust, adjustment, parameter)
            for adjustment, parameter in zip(self.adjustments, parameters, strict=True)
        ]
        groups = draws.host[:, :4].to(torch.int64)
        return apply_in_groups(images.to(self.work_type), groups, functions).to(torch.uint8)


ADJUSTMENTS = (brightness_, contrast_, saturation_, hue_)


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
    # A copy starts at offset 0, for which code is compiled once, and is aligned: on GPUs releases
    # before pytorch/pytorch#154442 lose what changes in place elsewhere.
    return adjustment(levels.clone(), parameter)


def draw_chosen(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """0 with this probability, else −1: float32 `[batch, 1]`, for `apply_in_groups`."""
    left = torch.rand(batch, 1, generator=generator) >= probability
    return -left.to(torch.float32)


def three_grey(images: Tensor) -> Tensor:
    """Each image's grey three times, as Pillow: uint8 `[B, 3, H, W]` to the same."""
    return to_uint8(grey(images.to(torch.float32))).expand_as(images)


class RandomGrey(Augmentation):
    """Turn an image to grey with this probability; three equal channels."""

    columns = 1  # 0: turned to grey, −1: left

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.turn_grey = three_grey

    def compile(self) -> None:
        self.turn_grey = torch.compile(three_grey, dynamic=True)

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return draw_chosen(batch, self.probability, generator)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        groups = draws.host.to(torch.int64)
        return apply_in_groups(images, groups, [lambda part, rows, turn: self.turn_grey(part)])


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

    Weights `[1, …]` serve all images.

    Along x, then along y, rounded and clipped to 0..255 after each, as Pillow does: equal, but for
    values that lie within float32's rounding of a half (1, rarely 2 apart). Pillow from 13 on takes
    y first for tall crops that shrink: there bilinear is up to 2 apart, bicubic at sharp edges 32.
    """
    rows = rows.expand(len(images), -1, -1)
    columns = columns.expand(len(images), -1, -1)
    if images.device.type != "cpu":
        return _resample(images, rows, columns).contiguous()
    # In parts that the caches hold: half the time of 1,024 images of 32 px at once.
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
    area = torch.empty(batch, tries).uniform_(*scale, generator=generator)
    log_ratio = torch.empty(batch, tries).uniform_(*map(math.log, ratio), generator=generator)
    place = torch.rand(batch, 2, generator=generator)
    # NumPy, whose calls cost a third of torch's on the few numbers of a photograph's crops.
    limits = np.array(size, dtype=np.float32)
    area, aspect = area.numpy() * (height * width), np.exp(log_ratio.numpy())
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


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 `[B, 3, H, W]` to float32 `(x/255 − mean)/std`, in channels_last memory."""
    scale = constant(tuple(1 / (255 * s) for s in std), images.device)
    shift = constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), images.device)
    pixels = images.to(torch.float32).mul_(scale[:, None, None]).add_(shift[:, None, None])
    # Last, since arithmetic and casts are several times slower on CPUs while channels lie last.
    return pixels.contiguous(memory_format=torch.channels_last)
