"""common/augment/operations.py against Pillow, bit for bit. No test here allows a difference."""

import itertools
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import pillow_reference
from assertions import assert_equal, assert_frequency, seeded
from common.augment.base import Draws
from common.augment.operations import OPERATIONS
from common.augment.randaugment import RandAugment
from common.augment.randaugment_gpu import rand_augment
from pillow_reference import CUTOUT_COLOUR, STRENGTHS, WITHOUT_STRENGTH, pictures, strength

torch.set_num_threads(1)

NAMES = tuple(OPERATIONS)  # draws hold indices into this order
SIGNED = tuple(name for name in STRENGTHS if STRENGTHS[name].signed)
ALL_MAGNITUDES = tuple(range(31))
TELLING_MAGNITUDES = (0, 1, 9, 10, 16, 29, 30)  # the ends, their neighbours, the paper's settings
ODD_SIZE = (48, 37)  # height, width
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@lru_cache
def cached_pictures(count: int, size: tuple[int, int]) -> Tensor:
    return pictures(count, size)


def random_centres(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Float [count, 2], x first, uniform over the picture."""
    return torch.rand(count, 2, generator=seeded(seed)) * torch.tensor([size[1], size[0]])


def check(name: str, images: Tensor, value: float, centres: Tensor | None = None) -> None:
    """One operation against Pillow; the input stays as it was and shares no memory with the result.

    Cutout gets random centres where none are given.
    """
    if name == "Cutout" and centres is None:
        centres = random_centres(len(images), tuple(images.shape[2:]), seed=round(1000 * value))
    further = () if centres is None else (centres,)
    before = images.clone()
    what = f"{name}({value!r}) on {tuple(images.shape)}"
    result = OPERATIONS[name](images, value, *further)
    assert_equal(images, before, f"{what} modified its input")
    assert_equal(result, pillow_reference.operate(name, before, value, centres), what)
    result.fill_(77)
    assert_equal(images, before, f"{what} shares memory with its input")


def cases(magnitudes: tuple[int, ...]) -> list:
    """(name, M, sign), both signs where the sign is drawn; one M where no strength is used."""
    return [
        pytest.param(name, magnitude, sign, id=f"{name}-{'-' if sign < 0 else ''}{magnitude}")
        for name in STRENGTHS
        for magnitude in ((9,) if name in WITHOUT_STRENGTH else magnitudes)
        for sign in ((1, -1) if name in SIGNED else (1,))
    ]


# The reference itself: what method.md says in words ----------------------------------------------


def test_the_sixteen_names() -> None:
    assert len(OPERATIONS) == 16
    assert set(OPERATIONS) == set(STRENGTHS)


def test_reference_agrees_with_the_specification_at_magnitude_9() -> None:
    values = {name: strength(name, 9) for name in STRENGTHS}
    assert values["Rotate"] == 9
    assert values["Cutout"] == 12
    assert values["TranslateX"] == values["TranslateY"] == 30
    assert values["Solarize"] == pytest.approx(76.8, abs=1e-12)
    assert values["Color"] == pytest.approx(0.64, abs=1e-12)

    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    posterized = pillow_reference.operate("Posterize", ramp, values["Posterize"])
    assert posterized.unique().tolist() == [0, 128]
    solarized = pillow_reference.operate("Solarize", ramp, values["Solarize"])[0, 0, 0]
    assert solarized[76:78].tolist() == [76, 255 - 77]
    added = pillow_reference.operate("SolarizeAdd", ramp, values["SolarizeAdd"])[0, 0, 0]
    assert added[[94, 95, 255]].tolist() == [127, 255 - 128, 0]

    bright = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    moved = pillow_reference.operate("TranslateX", bright, 30.0)
    assert moved[0, 0].sum(0).tolist() == [200 * 32] * 2 + [0] * 30
    cut = pillow_reference.operate("Cutout", bright, 12.0, torch.tensor([[16.0, 3.0]]))
    filled = (cut[0] == torch.tensor(CUTOUT_COLOUR)[:, None, None]).all(0)
    # The box moves in from the top edge and keeps its size; its far edges are filled too.
    assert filled.any(0).nonzero().flatten().tolist() == list(range(10, 23))
    assert filled.any(1).nonzero().flatten().tolist() == list(range(13))


# Every operation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "magnitude", "sign"), cases(ALL_MAGNITUDES))
def test_every_magnitude_at_32_pixels(name: str, magnitude: int, sign: int) -> None:
    check(name, cached_pictures(30, (32, 32)), sign * strength(name, magnitude))


@pytest.mark.parametrize(("name", "magnitude", "sign"), cases(TELLING_MAGNITUDES))
def test_224_pixels(name: str, magnitude: int, sign: int) -> None:
    check(name, cached_pictures(6, (224, 224)), sign * strength(name, magnitude))


@pytest.mark.parametrize(("name", "magnitude", "sign"), cases(TELLING_MAGNITUDES))
def test_neither_square_nor_even(name: str, magnitude: int, sign: int) -> None:
    for height, width in (ODD_SIZE, ODD_SIZE[::-1]):
        check(name, cached_pictures(15, (height, width)), sign * strength(name, magnitude))


@pytest.mark.parametrize(("name", "magnitude", "sign"), cases((9, 16)))
def test_whole_photograph(name: str, magnitude: int, sign: int) -> None:
    """byol_harder_aug_imagenet augments before it crops, so whole images of any size come in."""
    check(name, cached_pictures(1, (375, 500)), sign * strength(name, magnitude))


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 5), (3, 3)], ids=str)
def test_tiny_images(name: str, size: tuple[int, int]) -> None:
    """Sharpness's kernel no longer fits, Equalize has too few pixels for a step."""
    for magnitude in (0, 1, 9, 30):
        check(name, cached_pictures(15, size), strength(name, magnitude))


@pytest.mark.parametrize("name", STRENGTHS)
def test_batch_of_one(name: str) -> None:
    images = cached_pictures(30, (32, 32))
    for index in range(15):
        check(name, images[index : index + 1], strength(name, 9))


@pytest.mark.parametrize("name", [name for name in STRENGTHS if name not in WITHOUT_STRENGTH])
def test_values_between_the_magnitudes(name: str) -> None:
    """Random values over the whole range: no M lands near every edge of rounding."""
    low, high, signed = STRENGTHS[name]
    values = low + (high - low) * torch.rand(40, generator=seeded(1), dtype=torch.float64)
    for index, value in enumerate(values.tolist()):
        sign = -1 if signed and index % 2 else 1
        check(name, cached_pictures(15, ODD_SIZE), sign * value)


@pytest.mark.parametrize("name", STRENGTHS)
def test_value_zero(name: str) -> None:
    """For the blends 0 is the degenerate image, for the geometric operations both 0 and -0."""
    check(name, cached_pictures(30, (32, 32)), 0.0)
    if name in SIGNED:
        check(name, cached_pictures(30, (32, 32)), -0.0)


# One operation's edge cases ----------------------------------------------------------------------


def test_autocontrast_for_every_pair_of_extremes() -> None:
    """Each channel is the ramp 0..255 clamped to one (low, high): the whole table, all of them."""
    pairs = torch.tensor(list(itertools.combinations_with_replacement(range(256), 2)))
    low, high = pairs[: len(pairs) // 3 * 3].view(-1, 3, 1, 2).unbind(-1)
    ramps = torch.arange(256).clamp(low, high)[:, :, None].to(torch.uint8)  # [B, 3, 1, 256]
    for images in ramps.split(1024):
        check("AutoContrast", images, 0.0)


def test_equalize_on_skewed_histograms() -> None:
    """Powers of uniform noise: from nearly flat histograms to a few crowded levels."""
    noise = torch.rand(60, 3, 32, 32, generator=seeded(2), dtype=torch.float64)
    exponents = torch.linspace(-3, 5, 60, dtype=torch.float64).exp2().view(-1, 1, 1, 1)
    check("Equalize", (256 * noise**exponents).to(torch.uint8), 0.0)
    check("Equalize", 255 - (256 * noise**exponents).to(torch.uint8), 0.0)


@pytest.mark.parametrize("top", [1, 200, 255])
def test_equalize_where_its_step_changes(top: int) -> None:
    """n pixels below the top level give the step n // 255, and step 0 leaves the image alone."""
    counts = torch.tensor([1, 2, 127, 253, 254, 255, 256, 509, 510, 511, 764, 765, 766, 1023])
    places = torch.randperm(1024, generator=seeded(3)).view(1, 1, 32, 32)
    below = (places * 7 % top).expand(len(counts), 3, 32, 32)
    images = torch.where(places < counts.view(-1, 1, 1, 1), below, top).to(torch.uint8)
    check("Equalize", images, 0.0)


def test_posterize_keeps_the_bits_of_the_whole_part() -> None:
    for value in (0.0, 0.99, 1.0, 1.2, 1.999, 2.0, 2.5, 3.0, 3.999999, 4.0, 5.0, 7.5, 8.0):
        check("Posterize", cached_pictures(15, (32, 32)), value)


def test_solarize_thresholds() -> None:
    """A level equal to the threshold is inverted; 256 inverts nothing, 0 everything."""
    for value in (0.0, 0.5, 1.0, 76.8, 127.5, 128.0, 128.5, 254.5, 255.0, 255.5, 256.0):
        check("Solarize", cached_pictures(15, (32, 32)), value)


def test_solarize_add_takes_the_whole_part() -> None:
    for value in (0.0, 0.99, 1.0, 32.99, 33.0, 109.999, 110.0):
        check("SolarizeAdd", cached_pictures(15, (32, 32)), value)


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_blends_under_at_and_above_one(name: str) -> None:
    """Pillow interpolates up to 1, extrapolates and clips above it, and copies at 0 and 1."""
    near_one = (math.nextafter(1.0, 0.0), 1.0, math.nextafter(1.0, 2.0), 1 - 1e-7, 1 + 1e-7)
    for value in (0.0, 1e-6, 0.1, 0.5, 0.64, 0.999, *near_one, 1.001, 1.5, 1.9, 2.0):
        check(name, cached_pictures(30, (32, 32)), value)


def test_contrast_for_every_mean() -> None:
    """Half the pixels at n and half at n + 1: a mean of n + 0.5, which Pillow rounds up."""
    levels = torch.arange(255, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    levels[:, :, :4] += 1
    levels[1::3, :, 7, 7] -= 1  # just below the half (level 0 is not among these)
    for value in (0.1, 0.64, 1.3, 1.9):
        check("Contrast", levels, value)


@pytest.mark.parametrize("name", SIGNED)
def test_geometry_on_halves_and_wholes(name: str) -> None:
    """At half a pixel nearest neighbour has two candidates; beyond the size all is black."""
    values = (1e-9, 1e-5, 0.1, 0.25) if "Shear" in name else (1e-9, 0.25, 0.49, 0.5, 0.51, 1.0)
    if "Translate" in name:
        values += (1.5, 2.0, 2.5, 30.5, 31.0, 31.5, 32.0, 36.5, 37.0, 47.5, 48.0, 99.5, 100.0)
    for size in ((32, 32), ODD_SIZE):
        for value in values:
            check(name, cached_pictures(15, size)[:6], value)
            check(name, cached_pictures(15, size)[:6], -value)


# Cutout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), ODD_SIZE, (224, 224)], ids=str)
@pytest.mark.parametrize("magnitude", TELLING_MAGNITUDES)
def test_cutout_in_corners_on_edges_and_between(magnitude: int, size: tuple[int, int]) -> None:
    """All pairs of telling places on the two axes: the box meets no edge, one, or a corner."""
    value = strength("Cutout", magnitude)

    def places(length: int) -> list[float]:
        fractional = [0.25, 0.5, length / 2, length / 2 + 0.4]
        touching = [value / 2, value / 2 + 1, length - value / 2, length - 1 - value / 2]
        ends = [0.0, length - 1.0, length - 0.5, math.nextafter(length, 0)]
        inside = [min(max(place, 0.0), length - 1e-4) for place in touching]
        return fractional + inside + ends

    height, width = size
    centres = torch.tensor(list(itertools.product(places(width), places(height))))
    images = cached_pictures(1, size).expand(len(centres), -1, -1, -1)
    if size == (224, 224):  # a third of the places there, to save time
        images, centres = images[::3], centres[::3]
    check("Cutout", images, value, centres)


@pytest.mark.parametrize("magnitude", ALL_MAGNITUDES)
def test_cutout_where_truncation_turns_over(magnitude: int) -> None:
    """Centres one float to either side of `whole + value / 2`: single precision would slip."""
    value = strength("Cutout", magnitude)
    whole = torch.arange(31, dtype=torch.float32)
    at = (whole.double() + value / 2).float()
    below, above = (torch.nextafter(at, torch.tensor(end)) for end in (-math.inf, math.inf))
    along_x = torch.cat([below, at, above]).clamp(0, 31.999)
    centres = torch.stack([along_x, along_x.flip(0)], 1)
    check("Cutout", cached_pictures(1, (32, 32)).expand(len(centres), -1, -1, -1), value, centres)


# Memory layouts ----------------------------------------------------------------------------------


def layouts(images: Tensor) -> dict[str, Tensor]:
    """The same or similar pixels in other memory layouts."""
    return {
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "strided": images.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, 1::2, ::3],
        "transposed": images.transpose(2, 3),
        "window": images[1:, :, 3:-2, 5:],
        "expanded batch": images[4:5].expand(4, -1, -1, -1),
        "expanded channels": images[:, :1].expand(-1, 3, -1, -1),
    }


@pytest.mark.parametrize("name", STRENGTHS)
def test_operations_take_any_memory_layout(name: str) -> None:
    for images in layouts(cached_pictures(9, ODD_SIZE)).values():
        check(name, images, strength(name, 10))


def test_rand_augment_takes_any_memory_layout() -> None:
    augment = RandAugment(4, 10)
    for layout, images in layouts(cached_pictures(30, ODD_SIZE)).items():
        before = images.clone()
        draws = augment.draw(len(images), tuple(images.shape[2:]), seeded(4))
        result = augment.apply(images, Draws.of(draws))
        assert_equal(images, before, f"RandAugment on {layout} modified its input")
        expected = pillow_reference.rand_augment(before, draws, 10, NAMES)
        assert_equal(result, expected, f"RandAugment(4, 10) on {layout}")


# RandAugment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "size"), [(400, (32, 32)), (90, ODD_SIZE), (15, (224, 224))])
@pytest.mark.parametrize(("num_ops", "magnitude"), [(2, 9), (4, 10), (8, 16)])
def test_rand_augment_is_pillow_on_the_same_draws(
    num_ops: int, magnitude: int, count: int, size: tuple[int, int], device: str
) -> None:
    images = cached_pictures(count, size).to(device)
    before = images.clone()
    augment = RandAugment(num_ops, magnitude)
    draws = augment.draw(count, size, seeded(num_ops))
    result = augment.apply(images, Draws.of(draws))
    what = f"RandAugment({num_ops}, {magnitude}) at {size} on {device}"
    assert_equal(images, before.cpu(), f"{what} modified its input")
    expected = pillow_reference.rand_augment(before.cpu(), draws, magnitude, NAMES)
    assert_equal(result, expected, what)
    result.fill_(77)
    assert_equal(images, before.cpu(), f"{what} shares memory with its input")


@pytest.mark.parametrize("size", [(32, 32), ODD_SIZE, (2, 5), (224, 224)], ids=str)
@pytest.mark.parametrize("magnitude", TELLING_MAGNITUDES)
@pytest.mark.parametrize("relative", [False, True])
def test_a_gpus_families_of_operations_equal_the_cpus(
    magnitude: int, size: tuple[int, int], relative: bool
) -> None:
    """All operations, both signs, all kinds of pictures, in three turns; also one image alone."""
    count = 16 if size == (224, 224) else 480
    images = cached_pictures(count, size)
    augment = RandAugment(3, magnitude, relative)
    draws = augment.draw(count, size, seeded(17))
    expected = augment.apply(images, Draws.of(draws))
    before = images.clone()
    values = augment.values(*size)
    for rows in (slice(None), slice(0, 1), slice(1, 2), slice(2, 9)):
        result = rand_augment(images[rows], draws[rows].unflatten(1, (3, 4)), values)
        assert_equal(result, expected[rows], f"M = {magnitude} at {size}, rows {rows}")
    assert_equal(images, before, "the input")


@pytest.mark.parametrize("magnitude", ALL_MAGNITUDES)
def test_rand_augment_knows_every_strength(magnitude: int) -> None:
    """Each operation with each sign at every M, on five images; unsigned ones ignore the sign."""
    images = cached_pictures(160, ODD_SIZE)
    augment = RandAugment(1, magnitude)
    draws = augment.draw(len(images), ODD_SIZE, seeded(5))
    draws[:, 0] = torch.arange(160) % 16
    draws[:, 1] = 1 - 2 * (torch.arange(160) // 16 % 2)
    expected = pillow_reference.rand_augment(images, draws, magnitude, NAMES)
    what = f"RandAugment(1, {magnitude})"
    assert_equal(augment.apply(images, Draws.of(draws)), expected, what)


@pytest.mark.parametrize("size", [(32, 32), (28, 56), (224, 224)], ids=str)
def test_translations_in_proportion(size: tuple[int, int]) -> None:
    """At M = 9: 30 px at 224, a seventh of it at 32; other operations are left as they are."""
    images = pictures(15, size)
    names = list(OPERATIONS)
    for name, side in (("TranslateX", size[1]), ("TranslateY", size[0]), ("Rotate", 224)):
        for sign in (1, -1):
            draws = torch.tensor([names.index(name), sign, 0, 0]).expand(15, -1).to(torch.float32)
            result = RandAugment(1, 9, translate_relative=True).apply(images, Draws.of(draws))
            value = sign * pillow_reference.strength(name, 9) * side / 224
            expected = pillow_reference.operate(name, images, value)
            assert_equal(result, expected, f"{name} by {value}")


@pytest.mark.parametrize("name", STRENGTHS)
def test_one_operation_for_the_whole_batch(name: str) -> None:
    """A batch may draw the same operation for every image, and an operation twice in a row."""
    images = cached_pictures(30, (32, 32))
    augment = RandAugment(2, 9)
    draws = augment.draw(len(images), (32, 32), seeded(6))
    draws[:, [0, 4]] = NAMES.index(name)
    expected = pillow_reference.rand_augment(images, draws, 9, NAMES)
    assert_equal(augment.apply(images, Draws.of(draws)), expected, f"{name} twice")


# What is drawn -----------------------------------------------------------------------------------
# The seeds are fixed, so these tests cannot fail by chance once they have passed. A right sampler
# breaks one of the bounds, five standard deviations, for fewer than one seed in a hundred.


@lru_cache
def many_draws() -> Tensor:
    """[20,000 images, 4 operations, (index, sign, x, y)] for 48 x 37 pixels."""
    return RandAugment(4, 9).draw(20_000, ODD_SIZE, seeded(14)).view(-1, 4, 4)


def test_draws_layout() -> None:
    for num_ops in (1, 2, 8):
        draws = RandAugment(num_ops, 9).draw(5, ODD_SIZE, seeded(15))
        assert draws.shape == (5, 4 * num_ops)
        assert draws.is_floating_point()
        assert draws.device.type == "cpu"
    index, sign = many_draws()[..., 0], many_draws()[..., 1]
    assert index.unique().tolist() == list(range(16))
    assert set(sign.unique().tolist()) <= {-1.0, 1.0}


def test_operations_are_drawn_uniformly_and_with_replacement() -> None:
    index = many_draws()[..., 0]
    for operation, name in enumerate(NAMES):
        for position in range(4):
            drawn = index[:, position] == operation
            assert_frequency(drawn, 1 / 16, f"{name} as operation {position}")
    for first, second in itertools.combinations(range(4), 2):
        for one, other in itertools.product(range(16), repeat=2):
            both = (index[:, first] == one) & (index[:, second] == other)
            what = f"{NAMES[one]} as operation {first}, {NAMES[other]} as operation {second}"
            assert_frequency(both, 1 / 256, what)


def test_signs_are_fair_and_independent() -> None:
    index, sign = many_draws()[..., 0], many_draws()[..., 1]
    for name in SIGNED:
        drawn = index == NAMES.index(name)
        assert_frequency(sign[drawn] > 0, 1 / 2, f"{name}'s sign")
    signed = torch.isin(index, torch.tensor([float(NAMES.index(name)) for name in SIGNED]))
    for first, second in itertools.combinations(range(4), 2):
        both = signed[:, first] & signed[:, second]
        agree = sign[both, first] == sign[both, second]
        assert_frequency(agree, 1 / 2, f"signs of operations {first} and {second} agree")


def test_cutout_centres_are_uniform_on_each_axis() -> None:
    centres = many_draws()[many_draws()[..., 0] == NAMES.index("Cutout")][:, 2:]
    height, width = ODD_SIZE
    for centre, length in zip(centres.unbind(1), (width, height), strict=True):
        assert float(centre.min()) >= 0
        assert float(centre.max()) < length
        for part in range(8):
            inside = (centre >= part * length / 8) & (centre < (part + 1) * length / 8)
            assert_frequency(inside, 1 / 8, f"centres in part {part} of an axis of {length}")
    across = (centres[:, 0] < width / 2) == (centres[:, 1] < height / 2)
    assert_frequency(across, 1 / 2, "x and y in the same half")
    assert int((centres % 1 > 0).sum()) > 0.99 * centres.numel()  # fractional, not whole pixels


def test_images_of_a_batch_draw_independently() -> None:
    index, sign = many_draws()[..., 0], many_draws()[..., 1]
    for distance in (1, 2, 3, 512):
        same = index[distance:] == index[:-distance]
        assert_frequency(same, 1 / 16, f"the operation of the image {distance} before")
        signed = same & torch.isin(index[distance:], torch.tensor([float(NAMES.index("Rotate"))]))
        agree = sign[distance:][signed] == sign[:-distance][signed]
        assert_frequency(agree, 1 / 2, f"the sign of the image {distance} before")


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [-1, 31, 100])
def test_magnitude_outside_its_range(magnitude: int) -> None:
    with pytest.raises(ValueError, match=r"\b0\D+30\b"):
        RandAugment(2, magnitude)


@pytest.mark.parametrize("num_ops", [0, -1])
def test_too_few_operations(num_ops: int) -> None:
    with pytest.raises(ValueError, match=r"\b1\b"):
        RandAugment(num_ops, 9)


@pytest.mark.parametrize("magnitude", [0, 30])
def test_the_ends_of_the_range_are_allowed(magnitude: int) -> None:
    RandAugment(1, magnitude)
