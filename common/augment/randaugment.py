"""RandAugment(N, M) with the paper's sixteen operations (section 4 of the paper), batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.augment.base import Augmentation, Draws, apply_in_groups
from common.augment.operations import OPERATIONS, cutout, sharpened_inside, sharpness
from common.augment.randaugment_gpu import rand_augment
from common.augment.randaugment_photograph import Step, rand_augment_crop
from common.runtime.errors import UserError

# Strength at M = 0 and at M = 30, and whether its sign is drawn.
STRENGTHS: dict[str, tuple[float, float, bool]] = {
    "AutoContrast": (0, 0, False),
    "Equalize": (0, 0, False),
    "Invert": (0, 0, False),
    "Rotate": (0, 30, True),
    "Posterize": (0, 4, False),
    "Solarize": (0, 256, False),
    "SolarizeAdd": (0, 110, False),
    "Color": (0.1, 1.9, False),
    "Contrast": (0.1, 1.9, False),
    "Brightness": (0.1, 1.9, False),
    "Sharpness": (0.1, 1.9, False),
    "ShearX": (0, 0.3, True),
    "ShearY": (0, 0.3, True),
    "Cutout": (0, 40, False),
    "TranslateX": (0, 100, True),
    "TranslateY": (0, 100, True),
}


class RandAugment(Augmentation):
    """For each image, N operations drawn uniformly with replacement, at magnitude M.

    `RandAugment(2, 9)(images, generator)` maps uint8 `[B, 3, H, W]` to the same; `generator` is a
    CPU generator, whichever device the images are on.

    Args:
        num_ops: N, at least 1.
        magnitude: M, 0..30; the strength is low + M/30 · (high − low).
        translate_relative: translate in proportion to the image, as far as at 224 px, and not by
            the same number of pixels whatever its size. Not in the paper.

    Raises:
        UserError: for N below 1 or M outside 0..30.
    """

    def __init__(self, num_ops: int, magnitude: int, translate_relative: bool = False) -> None:
        if num_ops < 1:
            raise UserError(f"RandAugment needs at least 1 operation, not {num_ops}")
        if not 0 <= magnitude <= 30:
            raise UserError(f"RandAugment's magnitude M must be within 0..30, not {magnitude}")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.translate_relative = translate_relative
        self.operations = OPERATIONS
        # For each operation: its index, sign, and Cutout's centre x, y in pixels.
        self.columns = 4 * num_ops

    def compile(self) -> None:
        operations = dict(OPERATIONS)
        for name in ("Color", "Contrast", "Brightness"):
            operations[name] = torch.compile(OPERATIONS[name], dynamic=True)
        sharpen = torch.compile(sharpened_inside, dynamic=True)
        operations["Sharpness"] = partial(sharpness, sharpen=sharpen)
        self.operations = operations

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        height, width = size
        shape = (batch, self.num_ops, 1)
        operation = torch.randint(len(OPERATIONS), shape, generator=generator)
        sign = 1 - 2 * torch.randint(2, shape, generator=generator)
        centre = torch.rand(batch, self.num_ops, 2, generator=generator)
        centre *= torch.tensor([width, height])
        return torch.cat([operation, sign, centre], dim=2).flatten(1)

    def values(self, height: int, width: int) -> tuple[tuple[str, float], ...]:
        """Each operation's strength, without its sign, for images of this size."""
        share = self.magnitude / 30
        values = {name: low + share * (high - low) for name, (low, high, _) in STRENGTHS.items()}
        if self.translate_relative:
            values["TranslateX"] = self.magnitude * 100 * width / (30 * 224)
            values["TranslateY"] = self.magnitude * 100 * height / (30 * 224)
        return tuple(values.items())

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        host = draws.host.unflatten(1, (self.num_ops, 4))
        values = self.values(*images.shape[2:])
        if not draws.is_on_cpu:
            return rand_augment(images, host, values)
        # One group for each operation, or two by its sign: all its images share one strength.
        operation, is_negative = host[..., 0].to(torch.int64), host[..., 1] < 0
        is_signed = torch.tensor([is_signed for _, _, is_signed in STRENGTHS.values()])
        groups = 2 * operation + (is_signed[operation] & is_negative)
        functions = []
        for name, value in values:
            for sign in (1, -1):
                signed = sign * value if STRENGTHS[name][2] else value
                functions.append(partial(_operate, self.operations[name], signed, host[..., 2:]))
        return apply_in_groups(images, groups, functions)

    def crop(self, photograph: Tensor, box: Sequence[float], generator: torch.Generator) -> Tensor:
        """Draw for one photograph, and return a part of the result, as fast as one image goes.

        Args:
            photograph: uint8 `[3, H, W]`, on the CPU.
            box: top, left, height and width of the part, pixels.

        Returns:
            uint8 `[3, height, width]`.
        """
        size = (photograph.shape[1], photograph.shape[2])
        values = self.values(*size)
        steps = []
        draws = self.draw(1, size, generator).view(self.num_ops, 4)
        for operation, sign, *centre in draws.tolist():
            name, value = values[int(operation)]
            steps.append(Step(name, sign * value if STRENGTHS[name][2] else value, tuple(centre)))
        top, left, height, width = (int(edge) for edge in box)
        return rand_augment_crop(photograph, steps, (left, top, left + width, top + height))


def _operate(
    operation: Callable[..., Tensor],
    value: float,
    centres: Tensor,
    images: Tensor,
    rows: Tensor,
    turn: int,
) -> Tensor:
    if operation is cutout:
        return cutout(images, value, centres[rows, turn])
    return operation(images, value)
