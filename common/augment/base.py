"""Batched augmentation of 8-bit images, every random choice drawn per image.

Images are uint8 `[B, 3, H, W]` tensors on any device. An `Augmentation` works in two steps, so that
a step's randomness can be drawn once for the global batch, cut by rank and sent to the device:

    draws = augmentation.draw(batch, size, generator)      # CPU float32 [batch, columns]
    views = augmentation.apply(images, Draws.of(draws[rows], images.device))

`augmentation(images, generator)` does both. Arithmetic follows Pillow, whose 8-bit results define
these operations in the authors' code; where a function deviates, its docstring says by how much.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.runtime.ranks import send


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


def draw_chosen(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """0 with this probability, else −1: float32 `[batch, 1]`, for `apply_in_groups`."""
    left = torch.rand(batch, 1, generator=generator) >= probability
    return -left.to(torch.float32)


class RandomApply(Augmentation):
    """For each image one augmentation with this probability, else the other, or none.

    Both are drawn for the whole batch, so that an image's draws do not depend on the others'
    choices; each computes only the images that chose it. Both have to keep the images' size.

    Args:
        augmentation: applied with `probability`.
        probability: 0..1.
        otherwise: applied to the other images; None leaves them as they are.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        probability: float,
        otherwise: Augmentation | None = None,
    ) -> None:
        self.probability = probability
        self.choices = [augmentation] if otherwise is None else [augmentation, otherwise]
        # 0: the first, 1: the other; then the draws of the first and those of the other.
        self.columns = 1 + sum(choice.columns for choice in self.choices)

    def compile(self) -> None:
        for choice in self.choices:
            choice.compile()

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        choice = torch.rand(batch, 1, generator=generator) >= self.probability
        drawn = [choice.draw(batch, size, generator) for choice in self.choices]
        return torch.cat([choice, *drawn], dim=1)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        group = draws.host[:, 0].to(torch.int64)
        functions = []
        start = 1
        for index, choice in enumerate(self.choices):
            own = draws.columns(start, start + choice.columns)
            start += choice.columns
            host = own.host[group == index]  # in the order in which the images come, too
            functions.append(partial(_apply_chosen, choice, host, own.device))
        if len(functions) == 1:
            group = -group  # 1 leaves the image as it is
        return apply_in_groups(images, group[:, None], functions)


def _apply_chosen(
    choice: Augmentation, host: Tensor, device: Tensor, images: Tensor, rows: Tensor, turn: int
) -> Tensor:
    return choice.apply(images, Draws(host, device.index_select(0, rows)))
