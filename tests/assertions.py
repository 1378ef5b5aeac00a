"""What several tests of augmentations use."""

import math

import torch
from torch import Generator, Tensor

from common.augment.base import Augmentation, Chain, RandomApply


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def assert_equal(result: Tensor, expected: Tensor, what: str) -> None:
    """Two uint8 [B, C, H, W] agree bit for bit; if not, say where the first difference is."""
    assert result.dtype == torch.uint8, f"{what}: dtype {result.dtype}"
    assert result.shape == expected.shape, f"{what}: {result.shape}, not {expected.shape}"
    result = result.cpu()
    if torch.equal(result, expected):
        return
    difference = (result.int() - expected.int()).abs()
    wrong = difference.amax(1) > 0  # [B, H, W]
    image, row, column = wrong.nonzero()[0].tolist()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} pixels in {int(wrong.any(2).any(1).sum())} "
        f"of {len(wrong)} images differ, by at most {int(difference.max())}; the first is image "
        f"{image} at x = {column}, y = {row}: {result[image, :, row, column].tolist()}, "
        f"not {expected[image, :, row, column].tolist()}"
    )


def assert_frequency(occurred: Tensor, probability: float, what: str) -> None:
    """The count of a boolean tensor's True is within five binomial standard deviations."""
    trials = occurred.numel()
    bound = 5 * math.sqrt(trials * probability * (1 - probability))
    count, expected = int(occurred.sum()), trials * probability
    assert abs(count - expected) <= bound, (
        f"{what}: {count} of {trials}, expected {expected:.0f} within {bound:.0f}"
    )


def written(augmentation: Augmentation) -> object:
    """An augmentation as its name and what it was made with."""
    if isinstance(augmentation, Chain):
        return [written(part) for part in augmentation.augmentations]
    if isinstance(augmentation, RandomApply):
        return (augmentation.probability, *map(written, augmentation.choices))
    values = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in vars(augmentation).items()
        if isinstance(value, int | float | str | tuple | Tensor) and name != "columns"
    }
    values.pop("adjustments", None)  # ColorJitter's functions
    return type(augmentation).__name__, values
