"""Colours and crops against Pillow, Python's colorsys, torchvision's samplers and hand formulas.

Pillow has each resampling twice: on 8 bits, rounding and clipping after each axis, and in floating
point (mode F), rounding never. The second judges the weights; the first, which defines the authors'
views, what `resample` makes of them.
"""

import colorsys
import itertools
import math
import random
from collections.abc import Callable
from functools import lru_cache

import numpy
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from assertions import assert_equal, assert_frequency, seeded
from common.augment import crop as image_ops
from common.augment.base import Augmentation, Chain, Draws, apply_in_groups
from common.augment.colour import (
    ColorJitter,
    RandomGrey,
    brightness_,
    contrast_,
    grey,
    hue_,
    jitter_parameters,
    jittered,
    saturation_,
)
from common.augment.crop import RandomResizedCropFlip, draw_crops, resize_centre_crop
from common.augment.normalise import normalise
from common.augment.randaugment import RandAugment
from pillow_reference import pale, pictures, to_pillow, to_tensor

torch.set_num_threads(1)

Size = tuple[int, int]  # height, width

ODD_SIZE = (48, 37)
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@lru_cache
def cached_pictures(count: int, size: Size) -> Tensor:
    return pictures(count, size)


def difference(result: Tensor, expected: Tensor) -> Tensor:
    """Absolute, as float, after a look at the shapes and the result's type."""
    assert result.dtype == torch.uint8
    assert result.shape == expected.shape
    return (result.float() - expected.float()).abs()


def adjusted(adjust: Callable[[Tensor, Tensor], Tensor], images: Tensor, values: Tensor) -> Tensor:
    """One of ColorJitter's adjustments, which work in place on int16."""
    return adjust(images.to(torch.int16), values).to(torch.uint8)


# One value an image: brightness, contrast, saturation, grey --------------------------------------


@pytest.mark.parametrize("size", [(32, 32), ODD_SIZE, (1, 1), (224, 224)], ids=str)
@pytest.mark.parametrize(
    ("adjust", "enhancer"),
    [
        (brightness_, ImageEnhance.Brightness),
        (contrast_, ImageEnhance.Contrast),
        (saturation_, ImageEnhance.Color),
    ],
)
def test_adjustments_equal_pillow_bit_for_bit(
    adjust: Callable[[Tensor, Tensor], Tensor], enhancer: type, size: Size
) -> None:
    images = cached_pictures(15 if size == (224, 224) else 90, size)
    factors = 2.5 * torch.rand(len(images), generator=seeded(1))
    factors[:4] = torch.tensor([0.0, 1.0, 0.6, 1.4])  # 0.6 and 1.4 are the ends of ±0.4
    before = images.clone()
    expected = [
        enhancer(image).enhance(factor)
        for image, factor in zip(to_pillow(images), factors.tolist(), strict=True)
    ]
    assert_equal(adjusted(adjust, images, factors), to_tensor(expected), enhancer.__name__)
    assert_equal(images, before, f"the input of {enhancer.__name__}")


def test_grey_equals_pillow() -> None:
    colours = torch.randint(256, (1, 3, 1024, 1024), generator=seeded(2), dtype=torch.uint8)
    for images in (colours, cached_pictures(90, ODD_SIZE)):
        result = grey(images.float())
        expected = [image.convert("L").convert("RGB") for image in to_pillow(images)]
        assert result.dtype == torch.float32
        assert result.shape == (len(images), 1, *images.shape[2:])
        assert_equal(result.expand_as(images).to(torch.uint8), to_tensor(expected), "grey")


# Hue ---------------------------------------------------------------------------------------------


def test_hue_equals_colorsys_up_to_rounding() -> None:
    images = cached_pictures(60, (16, 16))
    shifts = torch.rand(len(images), generator=seeded(3)) - 0.5
    shifts[:4] = torch.tensor([-0.5, 0.5, 0.1, -0.1])
    turned = adjusted(hue_, images, shifts).flatten(2).transpose(1, 2)  # [B, pixels, channels]
    expected = []
    for pixels, shift in zip(
        images.flatten(2).transpose(1, 2).tolist(), shifts.tolist(), strict=True
    ):
        for red, green, blue in pixels:
            hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
            expected.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    exact = 255 * torch.tensor(expected, dtype=torch.float64)
    # Rounding moves a value by half a level; float32's error comes on top.
    assert float((turned.flatten(0, 1) - exact).abs().max()) <= 0.5 + 1e-3


def test_hue_turned_by_known_angles() -> None:
    """No turn; a third, where the channels change places; half, the complement."""
    colours = torch.randint(256, (3, 512, 512), generator=seeded(4), dtype=torch.uint8)
    complement = colours.amax(0) - (colours - colours.amin(0))
    expected = [colours, colours[[2, 0, 1]], colours[[1, 2, 0]], complement, complement]
    shifts = torch.tensor([0, 1 / 3, -1 / 3, 0.5, -0.5])
    turned = adjusted(hue_, colours.expand(5, -1, -1, -1), shifts)
    assert_equal(turned, torch.stack(expected), "hue")


def test_hue_leaves_grey_pixels() -> None:
    greys = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(201, 3, -1, -1)
    assert_equal(adjusted(hue_, greys, torch.linspace(-0.5, 0.5, 201)), greys, "greys")


def test_hue_against_pillows_coarse_one() -> None:
    """Pillow's HSV has 8 bits a channel, and torchvision truncates the shift to 255ths of a turn.

    Over all 2²⁴ colours and all of these shifts within ±0.1, at both ends of each, the greatest
    difference is 18 levels; here, pictures and a colour where that happens.
    """
    shifts = torch.linspace(-0.1, 0.1, 60)
    images = cached_pictures(60, (32, 32))
    turned = [
        functional.adjust_hue(image, shift)
        for image, shift in zip(to_pillow(images), shifts.tolist(), strict=True)
    ]
    apart = difference(adjusted(hue_, images, shifts), to_tensor(turned))
    assert float(apart.max()) <= 18
    assert float((apart <= 6).float().mean()) >= 0.98

    worst = torch.tensor([247, 0, 6], dtype=torch.uint8).view(1, 3, 1, 1)
    shift = 12 / 255 - 1e-6
    pillows = to_tensor([functional.adjust_hue(to_pillow(worst)[0], shift)])
    assert pillows.flatten().tolist() == [247, 46, 0]
    assert adjusted(hue_, worst, torch.tensor([shift])).flatten().tolist() == [247, 64, 0]


# ColorJitter -------------------------------------------------------------------------------------


def jitter_image_by_image(images: Tensor, draws: Tensor) -> Tensor:
    """The drawn adjustments in the drawn order; hue, where Pillow is coarse, by `hue_`."""
    results = []
    for image, row in zip(to_pillow(images), draws.tolist(), strict=True):
        order, (brightness, contrast, saturation, hue) = row[:4], row[4:]
        for adjustment in order:
            if adjustment == 0:
                image = ImageEnhance.Brightness(image).enhance(brightness)
            elif adjustment == 1:
                image = ImageEnhance.Contrast(image).enhance(contrast)
            elif adjustment == 2:
                image = ImageEnhance.Color(image).enhance(saturation)
            elif adjustment == 3:
                image = to_pillow(adjusted(hue_, to_tensor([image]), torch.tensor([hue])))[0]
        results.append(image)
    return to_tensor(results)


@pytest.mark.parametrize("hue", [0, 0.1])
def test_jitter_is_pillows_in_the_drawn_order(hue: float) -> None:
    images = cached_pictures(120, ODD_SIZE)
    jitter = ColorJitter(0.4, 0.4, 0.4, hue, probability=0.8)
    draws = jitter.draw(len(images), ODD_SIZE, seeded(5))
    result = jitter.apply(images, Draws.of(draws))
    assert_equal(result, jitter_image_by_image(images, draws), "ColorJitter")
    skipped = draws[:, 0] < 0
    assert 10 <= int(skipped.sum()) <= 40
    assert_equal(result[skipped], images[skipped], "images that are not jittered")


@pytest.mark.parametrize("size", [(32, 32), ODD_SIZE, (1, 1), (224, 224)], ids=str)
def test_a_gpus_steps_make_the_same_jitter(size: Size) -> None:
    """Every order, with and without jitter; hue by up to half a turn, factors from 0 to 2.5."""
    count = 15 if size == (224, 224) else 240
    images = cached_pictures(count, size)
    jitter = ColorJitter(1, 1.5, 1.5, 0.5, probability=0.8)
    draws = jitter.draw(count, size, seeded(5))
    draws[:4, 4] = torch.tensor([0.0, 1.0, 0.6, 1.4])
    before = images.clone()
    result = jittered(images, jitter_parameters(draws))
    assert_equal(images, before, "the input")
    assert_equal(result, jitter.apply(images, Draws.of(draws)), "ColorJitter on a GPU")


@lru_cache
def many_jitters() -> Tensor:
    """[20,000, 8]; contrast and saturation reach beyond 1, where factors stop at 0."""
    return ColorJitter(0.4, 1.0, 1.5, 0.1, probability=0.8).draw(20_000, (32, 32), seeded(6))


def test_jitter_draws_each_order_alike() -> None:
    order = many_jitters()[:, :4]
    jittered = order[:, 0] >= 0
    assert_frequency(jittered, 0.8, "jittered")
    assert order[~jittered].unique().tolist() == [-1]
    for permutation in itertools.permutations(range(4)):
        drawn = (order[jittered] == torch.tensor(permutation)).all(1)
        assert_frequency(drawn, 1 / 24, f"the order {permutation}")


def test_jitter_draws_factors_uniformly() -> None:
    ranges = {"brightness": (0.6, 1.4), "contrast": (0, 2), "saturation": (0, 2.5)}
    ranges["hue"] = (-0.1, 0.1)
    factors = many_jitters()[:, 4:].unbind(1)
    for (name, (low, high)), factor in zip(ranges.items(), factors, strict=True):
        share = (factor.double() - low) / (high - low)
        assert float(share.min()) >= -1e-6
        assert float(share.max()) <= 1 + 1e-6
        for part in range(8):
            assert_frequency((share * 8).floor() == part, 1 / 8, f"{name} in part {part} of 8")
    above = torch.stack(factors) > torch.tensor([1, 1, 1.25, 0])[:, None]
    for one, other in itertools.combinations(range(4), 2):
        assert_frequency(above[one] == above[other], 1 / 2, f"{one} and {other} on the same side")


@pytest.mark.parametrize("probability", [0, 1])
def test_jitter_never_and_always(probability: int) -> None:
    draws = ColorJitter(0.4, 0.4, 0.4, 0.1, probability).draw(1000, (32, 32), seeded(7))
    assert bool(((draws[:, :4] >= 0) == bool(probability)).all())


# RandomGrey --------------------------------------------------------------------------------------


def test_random_grey() -> None:
    images = cached_pictures(120, ODD_SIZE)
    augmentation = RandomGrey(probability=0.3)
    draws = augmentation.draw(len(images), ODD_SIZE, seeded(8))
    result = augmentation.apply(images, Draws.of(draws))
    turned = draws[:, 0] == 0
    expected = [
        image.convert("L").convert("RGB") if is_turned else image
        for image, is_turned in zip(to_pillow(images), turned.tolist(), strict=True)
    ]
    assert_equal(result, to_tensor(expected), "RandomGrey")
    assert 20 <= int(turned.sum()) <= 60


@pytest.mark.parametrize("probability", [0, 0.2, 1])
def test_random_grey_has_its_probability(probability: float) -> None:
    draws = RandomGrey(probability).draw(20_000, (32, 32), seeded(9))
    assert_frequency(draws == 0, probability, "turned to grey")


# Crops: what is made of a box --------------------------------------------------------------------

Resize = Callable[[Image.Image, int, str], Image.Image]  # image, side of the result, kernel

CROPS = [
    pytest.param(source, size, count, id=f"{source[0]}x{source[1]}-to-{size}")
    for source, size, count in [
        ((32, 32), 32, 300),
        ((29, 36), 32, 150),
        ((64, 48), 32, 90),
        ((375, 500), 32, 15),  # crops shrink to a tenth: antialiasing
        ((375, 500), 224, 15),
        ((120, 100), 224, 15),  # all crops grow
        ((700, 1000), 224, 2),
    ]
]
both_kernels = pytest.mark.parametrize("kernel", RESAMPLING)


def resize(image: Image.Image, size: int, kernel: str) -> Image.Image:
    return image.resize((size, size), RESAMPLING[kernel])


def resize_x_first(image: Image.Image, size: int, kernel: str) -> Image.Image:
    """One axis a call, which leaves Pillow no choice of the order."""
    return resize(image.resize((size, image.height), RESAMPLING[kernel]), size, kernel)


def crop_by_pillow(
    images: list[Image.Image], draws: Tensor, size: int, kernel: str, resize: Resize = resize
) -> list[Image.Image]:
    """Crop, resize, mirror, by rows of (top, left, height, width, flip)."""
    results = []
    for image, (top, left, height, width, flip) in zip(images, draws.tolist(), strict=True):
        part = resize(image.crop((left, top, left + width, top + height)), size, kernel)
        results.append(ImageOps.mirror(part) if flip else part)
    return results


def channels_in_floating_point(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(channel.float().numpy()) for channel in images.flatten(0, 1)]


def joined(channels: list[Image.Image]) -> Tensor:
    """The inverse: Pillow's mode F to float [B, 3, H, W]."""
    arrays = torch.stack([torch.from_numpy(numpy.array(channel)) for channel in channels])
    return arrays.unflatten(0, (-1, 3))


def resample_without_rounding(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None].double() @ images.double() @ columns[:, None].double().mT


def assert_same_weights(unrounded: Tensor, pillows: Tensor) -> None:
    """Float32 knows places among 500 pixels to 3e-5 of one: of 255 levels, a hundredth of one."""
    assert unrounded.dtype == torch.float64
    assert unrounded.shape == pillows.shape
    assert float((unrounded - pillows).abs().max()) <= 0.02


def assert_as_pillow(result: Tensor, expected: Tensor, share_equal: float) -> None:
    """The same axis by axis, but for values within rounding errors of a half.

    Those become either neighbour, on each axis anew: two levels apart, where both axes do it.
    """
    apart = difference(result, expected)
    assert float(apart.max()) <= 2
    assert float((apart <= 1).float().mean()) >= 0.9999
    assert float((apart == 0).float().mean()) >= share_equal


@both_kernels
@pytest.mark.parametrize(("source", "size", "count"), CROPS)
def test_crops_have_pillows_weights(
    source: Size, size: int, count: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_ops, "resample", resample_without_rounding)
    images = cached_pictures(count, source)
    augmentation = RandomResizedCropFlip(size, (0.2, 1), kernel)
    draws = augmentation.draw(count, source, seeded(10))
    channels = channels_in_floating_point(images)
    for_each_channel = draws.repeat_interleave(3, dim=0)
    pillows = joined(crop_by_pillow(channels, for_each_channel, size, kernel))
    assert_same_weights(augmentation.apply(images, Draws.of(draws)), pillows)


@both_kernels
@pytest.mark.parametrize(("source", "size", "count"), CROPS)
def test_crops_equal_pillows_along_x_then_y(
    source: Size, size: int, count: int, kernel: str
) -> None:
    images = cached_pictures(count, source)
    augmentation = RandomResizedCropFlip(size, (0.2, 1), kernel)
    draws = augmentation.draw(count, source, seeded(11))
    result = augmentation.apply(images, Draws.of(draws))
    expected = to_tensor(crop_by_pillow(to_pillow(images), draws, size, kernel, resize_x_first))
    # Shrinking by simple fractions, such as 3/4, bilinear weights meet halves more often.
    assert_as_pillow(result, expected, share_equal=0.985 if kernel == "bilinear" else 0.9995)


@pytest.mark.parametrize("source", [(32, 32), (17, 29)], ids=str)
def test_bilinear_crops_that_grow_to_32_equal_pillows_bit_for_bit(source: Size) -> None:
    """CIFAR-10's case: the weights are 64ths, which float32 and Pillow's integers hold exactly."""
    images = cached_pictures(300, source)
    augmentation = RandomResizedCropFlip(32, (0.2, 1))
    draws = augmentation.draw(300, source, seeded(12))
    expected = to_tensor(crop_by_pillow(to_pillow(images), draws, 32, "bilinear"))
    assert_equal(augmentation.apply(images, Draws.of(draws)), expected, "bilinear crops")


def tall(draws: Tensor, size: int) -> Tensor:
    """Boxes for which Pillow takes y first, from version 13 on (python-pillow/Pillow#9549).

    The height shrinks, and by far more than the width. The rule was found by trial, for square
    results of either kernel.
    """
    height, width = draws[:, 2], draws[:, 3]
    return (height > size) & (height - size > 2 * (width - size))


@both_kernels
@pytest.mark.parametrize(("source", "size", "count"), CROPS)
def test_pillow_takes_x_first_but_for_tall_crops(
    source: Size, size: int, count: int, kernel: str
) -> None:
    """So `resample` has Pillow's own order; of 32-pixel images, at 32 pixels, no crop is tall."""
    draws = RandomResizedCropFlip(size, (0.2, 1)).draw(count, source, seeded(13))
    wide = ~tall(draws, size)
    assert int(wide.sum()) >= count / 2
    images = to_pillow(cached_pictures(count, source)[wide])
    at_once, x_first = (
        to_tensor(crop_by_pillow(images, draws[wide], size, kernel, way))
        for way in (resize, resize_x_first)
    )
    assert_equal(at_once, x_first, "Pillow")


@both_kernels
@pytest.mark.parametrize(("source", "size"), [((64, 48), 32), ((375, 500), 224)])
def test_tall_crops_against_pillows_along_y_then_x(source: Size, size: int, kernel: str) -> None:
    """Rounding between the axes is then another, and so is bicubic's clipping.

    Its negative weights let a sharp edge between black and white shoot over by an eighth of the
    range, 32 levels, which is cut off after each axis. All 4 x 4 patterns in black and white, at
    places in steps of 1/20 pixel, come to 30, random ones in tall crops to 31.
    """
    augmentation = RandomResizedCropFlip(size, (0.2, 1), kernel)
    draws = augmentation.draw(200, source, seeded(14))
    draws = draws[tall(draws, size)]
    assert len(draws) >= 20

    def apart(images: Tensor) -> Tensor:
        expected = to_tensor(crop_by_pillow(to_pillow(images), draws, size, kernel))
        return difference(augmentation.apply(images, Draws.of(draws)), expected)

    anything = apart(cached_pictures(len(draws), source))
    is_bilinear = kernel == "bilinear"
    assert float(anything.max()) <= (2 if is_bilinear else 32)
    assert float((anything <= 1).float().mean()) >= (0.9999 if is_bilinear else 0.95)
    assert float((anything == 0).float().mean()) >= (0.88 if is_bilinear else 0.82)
    soft = pale(source, seeded(15)).to(torch.uint8)
    assert float(apart(soft.expand(len(draws), -1, -1, -1)).max()) <= 2, "nothing shoots over"


@both_kernels
def test_the_whole_image_at_its_own_size(kernel: str) -> None:
    images = cached_pictures(30, (40, 40))
    whole = torch.tensor([[0.0, 0, 40, 40, flip] for flip in (0, 1)]).repeat(15, 1)
    result = RandomResizedCropFlip(40, (1, 1), kernel).apply(images, Draws.of(whole))
    assert_equal(result[0::2], images[0::2], "unchanged")
    assert_equal(result[1::2], images[1::2].flip(3), "mirrored")


def test_pixels_outside_the_box_take_no_part() -> None:
    """Beyond its edges all is white; inside, one grey, which must come out alone."""
    for box in ([10, 7, 20, 24], [0, 47, 64, 1], [63, 0, 1, 1]):
        top, left, height, width = box
        images = torch.full((1, 3, 64, 48), 255, dtype=torch.uint8)
        images[:, :, top : top + height, left : left + width] = 100
        for kernel, flip, size in itertools.product(RESAMPLING, (0, 1), (8, 20, 50)):
            draws = torch.tensor([[*box, flip]], dtype=torch.float32)
            result = RandomResizedCropFlip(size, (0.2, 1), kernel).apply(images, Draws.of(draws))
            assert result.unique().tolist() == [100]


# Crops: which boxes are drawn --------------------------------------------------------------------


def torchvisions_boxes(count: int, size: Size, scale: tuple[float, float], seed: int) -> Tensor:
    """Top, left, height, width, [count, 4]."""
    blank = torch.empty(3, *size, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draw = transforms.RandomResizedCrop.get_params
        return torch.tensor([draw(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])


def assert_same_distribution(one: Tensor, other: Tensor, what: str) -> None:
    """Kolmogorov and Smirnov's test at 0.01 %: by how much the cumulated shares differ."""
    values = torch.cat([one, other]).unique()
    share = [
        torch.searchsorted(sample.sort().values, values, right=True) / len(sample)
        for sample in (one, other)
    ]
    distance = float((share[0] - share[1]).abs().max())
    bound = math.sqrt(-math.log(1e-4 / 2) / 2 * (1 / len(one) + 1 / len(other)))
    assert distance <= bound, f"{what}: {distance:.4f} apart, more than {bound:.4f}"


# The last image is so wide that half the draws end in the fallback.
DRAWN_FROM = [
    ((32, 32), (0.2, 1.0)),
    ((375, 500), (0.2, 1.0)),
    ((32, 32), (0.8, 1.0)),
    ((500, 333), (0.08, 1.0)),
    ((30, 120), (0.2, 1.0)),
]


@pytest.mark.parametrize(("size", "scale"), DRAWN_FROM, ids=str)
def test_boxes_are_distributed_as_torchvisions(size: Size, scale: tuple[float, float]) -> None:
    ours = draw_crops(20_000, size, scale, seeded(14))
    theirs = torchvisions_boxes(3000, size, scale, 15).float()
    quantities: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "top": lambda top, left, height, width: top,
        "left": lambda top, left, height, width: left,
        "height": lambda top, left, height, width: height,
        "width": lambda top, left, height, width: width,
        "area": lambda top, left, height, width: height * width,
        "aspect ratio": lambda top, left, height, width: width / height,
        "place": lambda top, left, height, width: top / size[0] - left / size[1],
        "space above": lambda top, left, height, width: top / (size[0] - height).clamp(min=1),
        "space to the left": lambda top, left, height, width: left / (size[1] - width).clamp(min=1),
    }
    for name, quantity in quantities.items():
        assert_same_distribution(quantity(*ours.unbind(1)), quantity(*theirs.unbind(1)), name)


@pytest.mark.parametrize(("size", "scale"), DRAWN_FROM[:-1], ids=str)
def test_boxes_are_whole_and_inside_and_of_the_right_shape(
    size: Size, scale: tuple[float, float]
) -> None:
    boxes = draw_crops(20_000, size, scale, seeded(16))
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, boxes.round())
    top, left, height, width = boxes.unbind(1)
    assert float(torch.stack([height, width]).min()) >= 1
    assert float(torch.stack([top, left]).min()) == 0
    assert float((top + height).max()) == size[0]
    assert float((left + width).max()) == size[1]
    # Each side was rounded, by half a pixel at most.
    area = size[0] * size[1]
    assert bool(((height + 0.5) * (width + 0.5) >= scale[0] * area).all())
    assert bool(((height - 0.5) * (width - 0.5) <= scale[1] * area).all())
    assert bool(((width + 0.5) / (height - 0.5) >= 3 / 4).all())
    assert bool(((width - 0.5) / (height + 0.5) <= 4 / 3).all())


def test_the_fallback_equals_torchvisions() -> None:
    """No crop of nine times the area fits: the fallback alone, on images of all shapes."""
    for size in itertools.product(range(1, 17), range(1, 17)):
        box = draw_crops(1, size, (9, 9), seeded(17))
        assert torch.equal(box, torchvisions_boxes(1, size, (9, 9), 0).float()), size


def test_the_fallback_of_long_images() -> None:
    """As tall or wide as the image, 4/3 or 3/4 of that in the other direction, in the middle."""
    wide, tall = ((4, 400), [0, 197, 4, 5]), ((400, 4), [197, 0, 5, 4])
    for size, box in (wide, tall):
        assert draw_crops(20, size, (0.2, 1), seeded(18)).unique(dim=0).tolist() == [box]
        assert torchvisions_boxes(1, size, (0.2, 1), 0)[0].tolist() == box


def test_half_the_crops_are_flipped() -> None:
    draws = RandomResizedCropFlip(32, (0.2, 1)).draw(20_000, (48, 48), seeded(19))
    flip, left = draws[:, 4], draws[:, 1]
    assert flip.unique().tolist() == [0, 1]
    assert_frequency(flip == 1, 1 / 2, "flipped")
    assert_frequency(flip[left > left.median()] == 1, 1 / 2, "flipped, of those on the right")


# The evaluation view, and the network's input ----------------------------------------------------


@pytest.mark.parametrize(
    ("source", "resized", "size", "kernel", "count", "share_equal"),
    [
        (32, 36, 32, "bicubic", 150, 0.995),
        (32, 35, 32, "bicubic", 150, 0.999),  # the offset 1.5 is rounded to 2
        (48, 37, 32, "bicubic", 90, 0.995),  # 2.5, to 2
        (300, 256, 224, "bilinear", 15, 0.999),
        (200, 256, 224, "bilinear", 15, 1),  # the weights are 64ths: see 32 pixels above
        (500, 256, 224, "bilinear", 5, 0.985),
    ],
)
def test_evaluation_view_is_torchvisions(
    source: int,
    resized: int,
    size: int,
    kernel: str,
    count: int,
    share_equal: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_torchvision = transforms.Compose(
        [
            transforms.Resize(resized, transforms.InterpolationMode(kernel)),
            transforms.CenterCrop(size),
        ]
    )
    images = cached_pictures(count, (source, source))
    result = resize_centre_crop(images, resized, size, kernel)
    expected = to_tensor([by_torchvision(image) for image in to_pillow(images)])
    assert_as_pillow(result, expected, share_equal)

    monkeypatch.setattr(image_ops, "resample", resample_without_rounding)
    unrounded = resize_centre_crop(images, resized, size, kernel)
    channels = [by_torchvision(channel) for channel in channels_in_floating_point(images)]
    assert_same_weights(unrounded, joined(channels))


@pytest.mark.parametrize(("side", "offset"), [(40, 4), (41, 4), (43, 6)])
def test_evaluation_view_without_resizing_is_the_central_cut(side: int, offset: int) -> None:
    """Halves, 4.5 and 5.5, are rounded to even as by torchvision."""
    images = cached_pictures(15, (side, side))
    middle = slice(offset, offset + 32)
    assert_equal(
        resize_centre_crop(images, side, 32, "bicubic"), images[..., middle, middle], "cut"
    )


def test_evaluation_view_of_oblong_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"square.*48, 37"):
        resize_centre_crop(cached_pictures(1, ODD_SIZE), 36, 32, "bicubic")


def test_normalise() -> None:
    images = cached_pictures(15, ODD_SIZE)
    before = images.clone()
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    result = normalise(images, mean, deviation)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / deviation[channel]
        assert float((result[:, channel].double() - expected).abs().max()) <= 1e-6
    assert_equal(images, before, "the input of normalise")


# Choices per image -------------------------------------------------------------------------------


def test_images_go_through_the_functions_of_their_groups_turn_by_turn() -> None:
    images = cached_pictures(7, (4, 5))
    before = images.clone()
    # Function 1 is never chosen; in the second turn the groups are cut across.
    groups = torch.tensor([[2, 0], [-1, 3], [0, 0], [2, -1], [-1, -1], [0, 3], [2, 2]])
    called = []

    def mark(number: int, level: Tensor, row: int, turn: int) -> Tensor:
        return level // 2 + 20 * number + row + 5 * turn

    def function(number: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        def run(part: Tensor, rows: Tensor, turn: int) -> Tensor:
            called.append((turn, number, rows.tolist()))
            marked = [mark(number, part[i], row, turn) for i, row in enumerate(rows.tolist())]
            if number == 3:  # changes its images in place
                return part.copy_(torch.stack(marked))
            return torch.stack(marked)

        return run

    result = apply_in_groups(images, groups, [function(number) for number in range(4)])
    assert called == [
        (0, 0, [2, 5]),
        (0, 2, [0, 3, 6]),
        (1, 0, [0, 2]),
        (1, 2, [6]),
        (1, 3, [1, 5]),
    ]
    expected = before.clone()
    for turn in range(2):
        for row, number in enumerate(groups[:, turn].tolist()):
            if number >= 0:
                expected[row] = mark(number, expected[row], row, turn)
    assert_equal(result, expected, "apply_in_groups")
    assert_equal(images, before, "its input")


@pytest.mark.parametrize("number", [-1, 0, 1])
def test_all_images_in_one_group(number: int) -> None:
    images = cached_pictures(5, (4, 5))
    functions = [lambda part, rows, turn: 255 - part, lambda part, rows, turn: part // 2]
    result = apply_in_groups(images, torch.full((5, 1), number), functions)
    expected = {-1: images, 0: 255 - images, 1: images // 2}[number]
    assert_equal(result, expected, f"all in group {number}")
    result.fill_(77)
    assert_equal(images, pictures(5, (4, 5)), "memory shared with the input")


# What holds for every augmentation ---------------------------------------------------------------

AUGMENTATIONS: dict[str, Augmentation] = {
    "crop": RandomResizedCropFlip(24, (0.2, 1)),
    "bicubic crop": RandomResizedCropFlip(24, (0.2, 1), "bicubic"),
    "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
    "grey": RandomGrey(probability=0.5),
    "RandAugment": RandAugment(2, 9),
    "chain": Chain(
        RandAugment(2, 9),
        RandomResizedCropFlip(24, (0.2, 1)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        RandomGrey(probability=0.2),
    ),
}
every_augmentation = pytest.mark.parametrize("name", AUGMENTATIONS)


@every_augmentation
def test_rows_of_draws_belong_to_rows_of_images(name: str) -> None:
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE)
    draws = augmentation.draw(60, ODD_SIZE, seeded(20))
    assert draws.shape == (60, augmentation.columns)
    assert draws.dtype == torch.float32
    whole = augmentation.apply(images, Draws.of(draws))
    assert tuple(whole.shape[2:]) == augmentation.output_size(ODD_SIZE)
    halves = [slice(0, 30), slice(30, 60)]
    single = [slice(index, index + 1) for index in range(15)]
    for rows in (*halves, *single, slice(1, None, 4), torch.randperm(60, generator=seeded(21))):
        result = augmentation.apply(images[rows], Draws.of(draws[rows]))
        assert_equal(result, whole[rows], f"{name}, rows {rows}")


@every_augmentation
def test_the_same_generator_gives_the_same_images(name: str) -> None:
    """And nothing else has a part in it: the global generators neither change nor matter."""
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        results.append(augmentation(images, seeded(22)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert numpy.random.get_state()[1].tolist() == before[2]
    assert_equal(results[1], results[0], "another global seed")
    draws = augmentation.draw(60, ODD_SIZE, seeded(22))
    assert_equal(augmentation.apply(images, Draws.of(draws)), results[0], "draw, then apply")
    assert not torch.equal(augmentation(images, seeded(23)), results[0])


@every_augmentation
def test_neither_images_nor_draws_are_changed(name: str) -> None:
    """Nor does the result share memory with the images; their layout in memory does not matter."""
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE).clone()
    draws = augmentation.draw(60, ODD_SIZE, seeded(24))
    images_before, draws_before = images.clone(), draws.clone()
    result = augmentation.apply(images, Draws.of(draws))
    assert torch.equal(draws, draws_before)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert_equal(augmentation.apply(channels_last, Draws.of(draws)), result, "channels last")
    result.fill_(77)
    assert_equal(images, images_before, f"the input of {name}")


@every_augmentation
def test_the_same_image_many_times_becomes_many(name: str) -> None:
    images = cached_pictures(1, ODD_SIZE).expand(64, -1, -1, -1)
    results = {bytes(image.flatten().tolist()) for image in AUGMENTATIONS[name](images, seeded(25))}
    # Grey has two outcomes; of jitter's a fifth are the image itself; RandAugment's can coincide.
    assert len(results) >= {"grey": 2, "jitter": 48, "RandAugment": 40}.get(name, 60)


def test_chain_is_one_after_another() -> None:
    """Each part gets its own columns, drawn for the size that the parts before it leave."""
    first, last = RandomResizedCropFlip(20, (0.8, 1)), RandomResizedCropFlip(12, (0.2, 1))
    parts = (first, RandAugment(2, 16), last)
    chain = Chain(*parts)
    images = cached_pictures(30, ODD_SIZE)
    draws = chain.draw(30, ODD_SIZE, seeded(26))
    generator = seeded(26)
    sizes = [ODD_SIZE, (20, 20), (20, 20)]
    drawn = [part.draw(30, size, generator) for part, size in zip(parts, sizes, strict=True)]
    assert torch.equal(draws, torch.cat(drawn, dim=1))
    assert chain.columns == 5 + 8 + 5
    assert chain.output_size(ODD_SIZE) == (12, 12)
    expected = images
    for part, own in zip(parts, drawn, strict=True):
        expected = part.apply(expected, Draws.of(own))
    assert_equal(chain.apply(images, Draws.of(draws)), expected, "Chain")
