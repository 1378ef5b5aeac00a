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

    @property
    def is_on_cpu(self) -> bool:
        """Whether the images are on a CPU, where they are sorted by what they drew.

        Then each image goes only through the operations that it drew. On GPUs, to launch fewer
        kernels, all images go through the same operations, and masks select the results.
        """
        return self.device.device.type == "cpu"

    def columns(self, start: int, stop: int) -> Draws:
        return Draws(self.host[:, start:stop], self.device[:, start:stop])

    def stacked(self) -> Draws:
        """Of two views of each image: the first half of the columns, and below it the second."""
        return Draws(*(torch.cat(part.chunk(2, dim=1)) for part in self))


class Augmentation(ABC):
    """A batched random map of uint8 images `[B, 3, H, W]`; see the module's docstring."""

    columns: int  # how many random numbers `draw` gives one image

    @abstractmethod
    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw for `batch` images of `size` (height, width): CPU float32 `[batch, columns]`."""

    def checked_draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """`draw`, whose width other augmentations find their own columns by.

        Raises:
            ValueError: if it is not `columns`.
        """
        drawn = self.draw(batch, size, generator)
        if drawn.shape[1:] != (self.columns,):
            raise ValueError(
                f"{type(self).__name__}.draw gives numbers of shape {tuple(drawn.shape)}; its "
                f"columns says ({batch}, {self.columns})"
            )
        return drawn

    @abstractmethod
    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment uint8 images `[B, 3, H, W]` by draws `[B, columns]`; the input is not changed."""

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that images of `size` (height, width) come out with."""
        return size

    def compile(self) -> None:  # noqa: B027 (for some there is nothing to compile)
        """From now on use `torch.compile` where it is faster, as `nn.Module.compile` does.

        On a CPU the images stay the same to the bit.
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
            drawn.append(augmentation.checked_draw(batch, size, generator))
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


class Turn(NamedTuple):
    """A batch sorted by group; see `sorted_turns`. Tensors are int64, on the images' device."""

    source: Tensor  # [B]: where each image was in the turn before
    rows: Tensor  # [B]: its index in the batch
    numbers: Tensor  # [columns, B]: its own numbers
    counts: list[int]  # how many images are in no group, then in each group


def sorted_turns(
    groups: Tensor, number: int, device: torch.device, columns: Sequence[Tensor] = ()
) -> tuple[list[Turn], Tensor]:
    """Sort a batch by group, turn by turn, and send all that this takes in one copy.

    Args:
        groups: int64 `[B, turns]` on the CPU, an image's group in each turn: 0..number − 1, or −1
            for none.
        number: of groups.
        device: where the turns are used.
        columns: int64 `[B, turns]` each, on the CPU: further numbers of each image.

    Returns:
        The turns, and int64 `[B]`: where each image of the batch is after the last one.
    """
    groups = groups.t()
    order = groups.argsort(dim=1, stable=True)  # [turns, B]
    place = order.argsort(dim=1)
    before = torch.cat([torch.arange(groups.shape[1])[None], place[:-1]])
    own = [numbers.t().gather(1, order) for numbers in (before.t(), *columns)]
    host = torch.stack([own[0], order, *own[1:]], dim=1).flatten(0, 1)
    sent = send(torch.cat([place[-1:], host]), device)
    turns = []
    for group, part in zip(groups, sent[1:].unflatten(0, (len(order), -1)), strict=True):
        counts = torch.bincount(group + 1, minlength=number + 1).tolist()
        turns.append(Turn(part[0], part[1], part[2:], counts))
    return turns, sent[0]


def apply_in_groups(
    images: Tensor, groups: Tensor, functions: Sequence[Callable[[Tensor, Tensor, int], Tensor]]
) -> Tensor:
    """Send each image through the functions of its groups, turn by turn.

    In each turn the images are sorted by group: a choice per image becomes a few calls on
    contiguous slices.

    Args:
        images: `[B, …]`.
        groups: integer `[B, turns]` on the CPU: an image's function in each turn, as an index of
            `functions`, or −1 to leave it as it is.
        functions: called with a group's images, their indices in the batch (int64, on the images'
            device) and the turn; return images of the same shape and type, or change them in place.
    """
    turns, back = sorted_turns(groups, len(functions), images.device)
    for number, turn in enumerate(turns):
        # index_select, since on CPUs images[rows] takes ten times as long.
        images = images.index_select(0, turn.source)
        parts = images.split(turn.counts)[1:], turn.rows.split(turn.counts)[1:]
        parts = zip(functions, *parts, strict=True)
        for function, part, part_rows in parts:
            if len(part):
                part.copy_(function(part, part_rows, number))
    return images.index_select(0, back)


def levels_type() -> torch.dtype:
    """The type that arithmetic on whole levels is done in: int16, or float32 while compiling.

    On CPUs casting int16 to float and back takes half the time that uint8 takes. In compiled code
    casts are free, but int16 is not vectorised.
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
    choices. On a CPU each computes only the images that chose it. Both must keep the images' size.

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
        widths = [choice.columns for choice in self.choices]
        parts = (part[:, 1:].split(widths, dim=1) for part in draws)
        own = [Draws(host, device) for host, device in zip(*parts, strict=True)]
        if not draws.is_on_cpu:
            chosen = per_image(draws.device[:, 0] == 0)
            made = [
                choice.apply(images, its) for choice, its in zip(self.choices, own, strict=True)
            ]
            return torch.where(chosen, made[0], made[1] if len(made) == 2 else images)
        group = draws.host[:, 0].to(torch.int64)
        functions = []
        for index, (choice, part) in enumerate(zip(self.choices, own, strict=True)):
            host = part.host[group == index]  # in the order in which the images come, too
            functions.append(partial(_apply_chosen, choice, host, part.device))
        if len(functions) == 1:
            group = -group  # 1 leaves the image as it is
        return apply_in_groups(images, group[:, None], functions)


def _apply_chosen(
    choice: Augmentation, host: Tensor, device: Tensor, images: Tensor, rows: Tensor, turn: int
) -> Tensor:
    return choice.apply(images, Draws(host, device.index_select(0, rows)))
