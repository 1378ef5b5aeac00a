"""common/augment/blur.py against Pillow and loops over images and tiles."""

import itertools
from functools import lru_cache

import pytest
import torch
from PIL import ImageFilter, ImageOps
from torch import Tensor

from assertions import assert_equal, assert_frequency, seeded
from common.augment.base import Augmentation, Chain, Draws, RandomApply
from common.augment.blur import GaussianBlur, box_blur, box_weights
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.crop import RandomFlip
from common.augment.grid_shuffle import GridShuffle
from common.augment.randaugment import RandAugment
from pillow_reference import pictures, to_pillow, to_tensor

torch.set_num_threads(1)

Size = tuple[int, int]  # height, width

ODD_SIZE = (48, 37)


@lru_cache
def cached_pictures(count: int, size: Size) -> Tensor:
    return pictures(count, size)


def one_by_one(augmentation: Augmentation, images: Tensor, draws: Tensor) -> list[Tensor]:
    """Each image [1, 3, H, W] augmented in a batch of its own."""
    rows = [slice(index, index + 1) for index in range(len(images))]
    return [augmentation.apply(images[row], Draws.of(draws[row])) for row in rows]


# Flip --------------------------------------------------------------------------------------------


def test_flip_is_pillows_mirror() -> None:
    images = cached_pictures(60, ODD_SIZE)
    augmentation = RandomFlip()
    draws = augmentation.draw(60, ODD_SIZE, seeded(1))
    expected = [
        ImageOps.mirror(image) if flipped else image
        for image, flipped in zip(to_pillow(images), (draws[:, 0] == 0).tolist(), strict=True)
    ]
    assert_equal(augmentation.apply(images, Draws.of(draws)), to_tensor(expected), "flip")
    assert draws.unique().tolist() == [-1, 0]


@pytest.mark.parametrize("probability", [0, 0.2, 0.5, 1])
@pytest.mark.parametrize("augmentation", [RandomFlip, GaussianBlur])
def test_probability_of_flip_and_blur(augmentation: type, probability: float) -> None:
    draws = augmentation(probability=probability).draw(20_000, (32, 32), seeded(2))
    assert_frequency(draws[:, 0] == 0, probability, f"{augmentation.__name__} applied")


# Blur --------------------------------------------------------------------------------------------


def blur_by_pillow(images: Tensor, sigmas: Tensor) -> Tensor:
    pairs = zip(to_pillow(images), sigmas.tolist(), strict=True)
    return to_tensor([image.filter(ImageFilter.GaussianBlur(sigma)) for image, sigma in pairs])


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("count", "size"),
    [(400, ODD_SIZE), (200, (32, 32)), (60, (3, 5)), (60, (1, 1)), (60, (2, 7)), (15, (224, 224))],
)
def test_blur_equals_pillows(
    count: int, size: Size, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ends of σ's range, and both sides of √2, where the box becomes wider."""
    images = cached_pictures(count, size)
    augmentation = GaussianBlur(probability=1)
    draws = augmentation.draw(count, size, seeded(3))
    draws[:6, 1] = torch.tensor([0.1, 2.0, 2**0.5, 1.41421, 1.41422, 1.0])
    expected = blur_by_pillow(images, draws[:, 1])
    monkeypatch.setattr(Draws, "is_on_cpu", not on_gpu)
    assert_equal(augmentation.apply(images, Draws.of(draws)), expected, "blur")


def test_boxes_of_every_sigma_are_pillows() -> None:
    """20,001 values of σ from 0.1 to 2 show weights to a level: a white point in a black row."""
    sigmas = torch.linspace(0.1, 2, 20_001)
    row = torch.zeros(len(sigmas), 3, 1, 15, dtype=torch.uint8)
    row[..., 7] = 255
    wide = box_weights(sigmas)[2] > 0
    expected = blur_by_pillow(row, sigmas)
    for part in (wide, ~wide):
        result = box_blur(row[part], box_weights(sigmas[part]), is_wide=bool(wide[part].any()))
        assert_equal(result, expected[part], "a point")


def test_a_box_by_hand() -> None:
    """σ² = 3/2 is three boxes of variance ½. Weights e, w, e have variance 2e: e = ¼ and w = ½."""
    full, near, far, extra = box_weights(torch.tensor([1.5**0.5])).flatten().tolist()
    assert abs(near - 2**22) <= 2
    assert full + 2 * near in (2**24, 2**24 - 1)
    assert far == 0
    assert extra == 2**23 - 128 * (2**24 - full - 2 * near)


def test_blur_leaves_the_others() -> None:
    images = cached_pictures(60, ODD_SIZE)
    augmentation = GaussianBlur(sigma=(1.5, 2.0))
    draws = augmentation.draw(60, ODD_SIZE, seeded(4))
    left = draws[:, 0] < 0
    assert 15 <= int(left.sum()) <= 45
    expected = images.clone()
    expected[~left] = blur_by_pillow(images[~left], draws[~left, 1])
    assert_equal(augmentation.apply(images, Draws.of(draws)), expected, "images that are left")
    assert not torch.equal(expected[~left], images[~left])


@pytest.mark.parametrize(("low", "high"), [(0.1, 2.0), (1.0, 1.5)])
def test_sigma_is_uniform(low: float, high: float) -> None:
    draws = GaussianBlur(sigma=(low, high)).draw(20_000, (32, 32), seeded(5))
    sigma = draws[:, 1].double()
    assert low - 1e-6 <= float(sigma.min()) <= float(sigma.max()) <= high + 1e-6
    part = ((sigma - low) / (high - low) * 8).floor()
    for index in range(8):
        assert_frequency(part == index, 1 / 8, f"σ in part {index} of 8")
    assert_frequency((draws[:, 0] == 0) == (part < 4), 1 / 2, "blurred and narrow, or neither")
    assert_frequency((part[1:] < 4) == (part[:-1] < 4), 1 / 2, "neighbours on the same side")


@pytest.mark.parametrize("sigma", [(0.0, 1.0), (0.1, 2.5), (1.5, 1.0)])
def test_sigma_outside_its_range(sigma: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 < least ≤ greatest ≤ 2"):
        GaussianBlur(sigma)


# GridShuffle -------------------------------------------------------------------------------------


def shuffle_by_hand(images: Tensor, draws: Tensor, grid: int) -> Tensor:
    height, width = images.shape[2] // grid, images.shape[3] // grid
    result = images.clone()
    for index, order in enumerate(draws.int().tolist()):
        for place, tile in enumerate(order):
            to_y, to_x = place // grid * height, place % grid * width
            from_y, from_x = tile // grid * height, tile % grid * width
            result[index, :, to_y : to_y + height, to_x : to_x + width] = images[
                index, :, from_y : from_y + height, from_x : from_x + width
            ]
    return result


@pytest.mark.parametrize("grid", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("count", "size"), [(45, (32, 32)), (4, (224, 224)), (30, ODD_SIZE), (8, (3, 9))]
)
def test_grid_shuffle_is_tile_by_tile(count: int, size: Size, grid: int) -> None:
    images = cached_pictures(count, size)
    augmentation = GridShuffle(grid)
    draws = augmentation.draw(count, size, seeded(6))
    result = augmentation.apply(images, Draws.of(draws))
    assert_equal(result, shuffle_by_hand(images, draws, grid), f"GridShuffle({grid})")


def test_grid_shuffle_of_numbered_pixels() -> None:
    """Two by two tiles of 2 × 2 pixels; the fifth column stays."""
    numbers = torch.arange(20, dtype=torch.uint8).view(1, 1, 4, 5).expand(-1, 3, -1, -1)
    result = GridShuffle(2).apply(numbers, Draws.of(torch.tensor([[3.0, 0.0, 1.0, 2.0]])))
    rows = [[12, 13, 0, 1, 4], [17, 18, 5, 6, 9], [2, 3, 10, 11, 14], [7, 8, 15, 16, 19]]
    expected = torch.tensor(rows, dtype=torch.uint8).expand(1, 3, -1, -1)
    assert_equal(result, expected, "numbered pixels")


def test_grid_shuffle_in_order_is_the_image() -> None:
    images = cached_pictures(15, ODD_SIZE)
    draws = torch.arange(16.0).expand(15, -1)
    assert_equal(GridShuffle(4).apply(images, Draws.of(draws)), images, "tiles in order")


def test_grid_shuffle_draws_each_permutation_alike() -> None:
    """All 24 of a 2 × 2 grid; of a 4 × 4 grid, each tile at each place and pairs of neighbours."""
    draws = GridShuffle(2).draw(20_000, (32, 32), seeded(7))
    for permutation in itertools.permutations(range(4)):
        drawn = (draws == torch.tensor(permutation)).all(1)
        assert_frequency(drawn, 1 / 24, f"the permutation {permutation}")
    draws = GridShuffle(4).draw(20_000, (32, 32), seeded(8))
    assert torch.equal(draws.sort(dim=1).values, torch.arange(16.0).expand(20_000, -1))
    for place, tile in itertools.product(range(16), range(16)):
        assert_frequency(draws[:, place] == tile, 1 / 16, f"tile {tile} at place {place}")
    for place in range(15):
        follows = draws[:, place + 1] == draws[:, place] + 1
        assert_frequency(follows, 15 / (16 * 15), f"tiles in order at place {place}")


# Choices -----------------------------------------------------------------------------------------


def test_choice_is_made_image_by_image() -> None:
    images = cached_pictures(60, ODD_SIZE)
    first, other = RandAugment(2, 9), GridShuffle(4)
    augmentation = RandomApply(first, 0.5, otherwise=other)
    draws = augmentation.draw(60, ODD_SIZE, seeded(9))
    assert draws.shape == (60, 1 + 8 + 16)
    by_first = one_by_one(first, images, draws[:, 1:9])
    by_other = one_by_one(other, images, draws[:, 9:])
    expected = [(by_first, by_other)[int(row[0])][index] for index, row in enumerate(draws)]
    assert_equal(augmentation.apply(images, Draws.of(draws)), torch.cat(expected), "choice")
    assert 15 <= int(draws[:, 0].sum()) <= 45
    # Parts are drawn for all images, whatever they choose.
    never = RandomApply(first, 0, otherwise=other).draw(60, ODD_SIZE, seeded(9))
    assert torch.equal(never[:, 1:], draws[:, 1:])


def test_applied_or_left_image_by_image() -> None:
    images = cached_pictures(60, ODD_SIZE)
    augmentation = RandomApply(GridShuffle(4), 0.5)
    draws = augmentation.draw(60, ODD_SIZE, seeded(10))
    left = draws[:, :1] == 1
    order = torch.where(left, torch.arange(16.0), draws[:, 1:])
    expected = shuffle_by_hand(images, order, 4)
    assert_equal(augmentation.apply(images, Draws.of(draws)), expected, "applied or left")
    assert 15 <= int(left.sum()) <= 45


@pytest.mark.parametrize("probability", [0, 0.1, 0.9, 1])
@pytest.mark.parametrize("otherwise", [None, RandomFlip()])
def test_probability_of_a_choice(probability: float, otherwise: Augmentation | None) -> None:
    augmentation = RandomApply(GridShuffle(2), probability, otherwise)
    draws = augmentation.draw(20_000, (32, 32), seeded(11))
    assert set(draws[:, 0].tolist()) <= {0, 1}
    assert_frequency(draws[:, 0] == 0, probability, "the first chosen")
    moved = draws[:, 1] != 0
    assert_frequency(moved[draws[:, 0] == 0], 3 / 4, "the first tile moved, where chosen")


def test_only_the_chosen_images_are_computed() -> None:
    class Recorder(RandomFlip):
        def apply(self, images: Tensor, draws: Draws) -> Tensor:
            computed.append((images[:, 0, 0, 0].tolist(), draws.host.tolist()))
            assert torch.equal(draws.host, draws.device)
            return super().apply(images, draws)

    computed: list[tuple[list[int], list[list[float]]]] = []
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 3, 2, 2)
    augmentation = RandomApply(Recorder(), 0.5, otherwise=Recorder())
    draws = torch.tensor([[1, -1, -2], [0, -3, -4], [1, -5, -6], [0, -7, -8], [1, -9, -10.0]])
    draws[:, 1:] = draws[:, 1:].clamp(min=-1)
    draws[4, 2] = draws[1, 1] = 0  # one flip in each
    augmentation.apply(images, Draws.of(draws))
    assert computed == [([1, 3], [[0], [-1]]), ([0, 2, 4], [[-1], [-1], [0]])]
    computed.clear()
    draws[:, 0] = 1
    augmentation.apply(images, Draws.of(draws))
    assert [images for images, _ in computed] == [[0, 1, 2, 3, 4]]


# What holds for every augmentation ---------------------------------------------------------------

AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": RandomFlip(),
    "blur": GaussianBlur(),
    "shuffle": GridShuffle(4),
    "shuffled or left": RandomApply(GridShuffle(4), 0.5),
    "one of two": RandomApply(RandAugment(2, 9), 0.6, otherwise=GridShuffle(4)),
    "chain": Chain(
        RandomFlip(), GaussianBlur(), RandomApply(RandomApply(GridShuffle(3), 0.7), 0.5)
    ),
}
AUGMENTATIONS["jitter and grey"] = Chain(ColorJitter(0.4, 0.4, 0.4, 0.1, 0.8), RandomGrey(0.2))
every_augmentation = pytest.mark.parametrize("name", AUGMENTATIONS)


@every_augmentation
def test_rows_of_draws_belong_to_rows_of_images(name: str) -> None:
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE)
    draws = augmentation.draw(60, ODD_SIZE, seeded(20))
    assert draws.shape == (60, augmentation.columns)
    assert draws.dtype == torch.float32
    whole = augmentation.apply(images, Draws.of(draws))
    assert_equal(torch.cat(one_by_one(augmentation, images, draws)), whole, f"{name}, one by one")
    order = torch.randperm(60, generator=seeded(21))
    for rows in (slice(0, 30), slice(30, 60), slice(1, None, 4), slice(0, 0), order):
        result = augmentation.apply(images[rows], Draws.of(draws[rows]))
        assert_equal(result, whole[rows], f"{name}, rows {rows}")


@every_augmentation
def test_the_same_generator_gives_the_same_images(name: str) -> None:
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE)
    first = augmentation(images, seeded(22))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert_equal(augmentation(images, seeded(22)), first, "the same seed")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augmentation(images, seeded(23)), first)


@every_augmentation
def test_neither_images_nor_draws_are_changed(name: str) -> None:
    """Nor does the result share memory with the images; their layout in memory does not matter."""
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE).clone()
    draws = augmentation.draw(60, ODD_SIZE, seeded(24))
    images_before, draws_before = images.clone(), draws.clone()
    result = augmentation.apply(images, Draws.of(draws))
    assert torch.equal(draws, draws_before)
    wider = torch.zeros(60, 3, 50, 80, dtype=torch.uint8)
    window = wider[:, :, 1:49, 2:76:2].copy_(images)
    for layout in (images.contiguous(memory_format=torch.channels_last), window):
        assert not layout.is_contiguous()
        assert_equal(augmentation.apply(layout, Draws.of(draws)), result, "another layout")
    result.fill_(77)
    assert_equal(images, images_before, f"the input of {name}")


@every_augmentation
def test_the_same_image_many_times_becomes_many(name: str) -> None:
    images = cached_pictures(1, ODD_SIZE).expand(64, -1, -1, -1)
    results = {bytes(image.flatten().tolist()) for image in AUGMENTATIONS[name](images, seeded(25))}
    # A flip has two outcomes; about half the images are neither blurred nor shuffled.
    least = {"flip": 2, "blur": 20, "shuffled or left": 20, "one of two": 40, "chain": 40}
    least["jitter and grey"] = 40
    assert len(results) >= least.get(name, 60)


@every_augmentation
def test_apply_reads_no_value_from_the_device(name: str) -> None:
    """A meta tensor has no values: .item(), nonzero and reading by a boolean index raise errors."""
    augmentation = AUGMENTATIONS[name]
    draws = augmentation.draw(60, ODD_SIZE, seeded(26))
    images = cached_pictures(60, ODD_SIZE).to("meta")
    result = augmentation.apply(images, Draws.of(draws, "meta"))
    assert result.device.type == "meta"
    assert result.shape == images.shape
    assert result.dtype == torch.uint8


@every_augmentation
def test_a_gpus_way_makes_the_same_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images computed and chosen by masks, where a CPU sorts them."""
    augmentation, images = AUGMENTATIONS[name], cached_pictures(60, ODD_SIZE)
    draws = augmentation.draw(60, ODD_SIZE, seeded(27))
    expected = augmentation.apply(images, Draws.of(draws))
    monkeypatch.setattr(Draws, "is_on_cpu", False)
    before = images.clone()
    assert_equal(augmentation.apply(images, Draws.of(draws)), expected, f"{name} on a GPU")
    assert_equal(images, before, "the input")
