"""RandAugment of whole photographs, of which a crop is kept, against Pillow's whole results."""

import itertools
import random

import pytest
import torch
from torch import Tensor

import pillow_reference
from assertions import assert_equal, seeded
from common.augment.base import Draws
from common.augment.operations import OPERATIONS
from common.augment.randaugment import STRENGTHS, RandAugment
from common.augment.randaugment_photograph import Step, rand_augment_crop
from pillow_reference import pictures, strength

torch.set_num_threads(1)

NAMES = tuple(OPERATIONS)


def whole_then_cut(photograph: Tensor, steps: list[Step], box: tuple[int, ...]) -> Tensor:
    images = photograph[None]
    for step in steps:
        centre = torch.tensor([step.centre]) if step.name == "Cutout" else None
        images = pillow_reference.operate(step.name, images, step.value, centre)
    left, top, right, bottom = box
    return images[0, :, top:bottom, left:right]


def random_step(name: str, magnitude: int, size: tuple[int, int], chance: random.Random) -> Step:
    sign = chance.choice((1, -1)) if STRENGTHS[name][2] else 1
    # Centres are float32, as drawn.
    centre = torch.tensor([chance.random() * size[1], chance.random() * size[0]]).tolist()
    return Step(name, sign * strength(name, magnitude), tuple(centre))


def random_box(size: tuple[int, int], chance: random.Random) -> tuple[int, int, int, int]:
    (top, bottom), (left, right) = (sorted(chance.sample(range(n + 1), 2)) for n in size)
    return left, top, right, bottom


@pytest.mark.parametrize("size", [(40, 57), (57, 40), (224, 300)], ids=str)
def test_every_pair_of_operations_shows_the_same_in_a_crop(size: tuple[int, int]) -> None:
    """Random boxes from one pixel to nearly all; every sixteenth is the whole photograph."""
    photographs = pictures(15, size)
    chance = random.Random(0)
    count = 1 if size[0] == 224 else 4
    for number, names in enumerate(count * list(itertools.product(NAMES, NAMES))):
        photograph = photographs[chance.randrange(15)]
        steps = [random_step(name, chance.choice((9, 16, 30)), size, chance) for name in names]
        box = random_box(size, chance) if number % 16 else (0, 0, size[1], size[0])
        before = photograph.clone()
        # Decoded photographs have channels last in memory, or first.
        if number % 2:
            photograph = photograph.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        result = rand_augment_crop(photograph, steps, box)
        assert_equal(photograph, before, "the input")
        what = f"{steps} at {box} of {size}"
        assert_equal(result[None], whole_then_cut(photograph, steps, box)[None], what)
        result.fill_(77)
        assert_equal(photograph, before, "shares memory with the input")


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (5, 2)], ids=str)
def test_tiny_photographs(size: tuple[int, int]) -> None:
    photographs = pictures(15, size)
    chance = random.Random(1)
    for photograph, name, magnitude in itertools.product(photographs, NAMES, (0, 9, 30)):
        steps = [random_step(name, magnitude, size, chance), random_step(name, 9, size, chance)]
        box = random_box(size, chance)
        result = rand_augment_crop(photograph, steps, box)
        assert_equal(result[None], whole_then_cut(photograph, steps, box)[None], f"{steps}")


@pytest.mark.parametrize("translate_relative", [False, True])
def test_a_crop_draws_and_shows_what_the_batched_operations_do(translate_relative: bool) -> None:
    augment = RandAugment(4, 9, translate_relative)
    for index, photograph in enumerate(pictures(15, (60, 80))):
        draws = augment.draw(1, (60, 80), seeded(index))
        whole = augment.apply(photograph[None], Draws.of(draws))[0]
        part = augment.crop(photograph, (7.0, 20.0, 31.0, 52.0), seeded(index))
        assert_equal(part[None], whole[None, :, 7:38, 20:72], f"photograph {index}")
