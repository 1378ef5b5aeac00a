"""common/views.py: which views a regime makes; seeding.py: from which draws; picture.py: a look."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from assertions import assert_equal
from common.augment.base import Chain, Draws
from common.augment.colour import ColorJitter, RandomGrey
from common.augment.crop import RandomResizedCropFlip
from common.augment.randaugment import RandAugment
from common.runtime.seeding import epoch_order, generator_for
from common.training.picture import picture_views
from common.views import Regime, ViewMaker, Views
from pillow_reference import pictures, to_pillow, to_tensor

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
COUNT = 32
IMAGE_SIZE = (40, 30)  # height, width: larger than a view, and oblong
VIEW_SIZE = 24
STANDARD = Chain(
    RandomResizedCropFlip(VIEW_SIZE, (0.2, 1)),
    ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
    RandomGrey(probability=0.2),
)
HEAVY = RandAugment(2, 9)
REGIMES: tuple[Regime, ...] = ("baseline", "joint", "dssl")
WITH_HEAVY: tuple[Regime, ...] = ("joint", "dssl")


@pytest.fixture
def images() -> Tensor:
    return pictures(COUNT, IMAGE_SIZE)


def draw(regime: Regime, *key: int) -> Tensor:
    maker = ViewMaker(STANDARD, HEAVY, regime)
    return maker.draw(COUNT, IMAGE_SIZE, generator_for("views", *key))


def make(regime: Regime, images: Tensor, draws: Tensor) -> Views:
    return ViewMaker(STANDARD, HEAVY, regime).make(images, draws)


# Views -------------------------------------------------------------------------------------------


def test_baseline_makes_standard_views_alone(images: Tensor) -> None:
    draws = draw("baseline", 0, 1, 0)
    assert draws.shape == (COUNT, 2 * (5 + 8 + 1))
    views = make("baseline", images, draws)
    assert (views.heavy_1, views.heavy_2) == (None, None)
    for standard in (views.standard_1, views.standard_2):
        assert standard.shape == (COUNT, 3, VIEW_SIZE, VIEW_SIZE)
    assert not torch.equal(views.standard_1, views.standard_2)


@pytest.mark.parametrize("regime", WITH_HEAVY)
def test_heavy_views_are_derived_from_their_own_standard_views(
    regime: Regime, images: Tensor
) -> None:
    """The four views done again step by step, drawn in the order v, v', v̂, v̂'."""
    generator = generator_for("views", 0, 1, 0)
    drawn = [STANDARD.draw(COUNT, IMAGE_SIZE, generator) for _ in range(2)]
    drawn += [HEAVY.draw(COUNT, (VIEW_SIZE, VIEW_SIZE), generator) for _ in range(2)]
    draws = draw(regime, 0, 1, 0)
    assert torch.equal(draws, torch.cat(drawn, dim=1))
    before = images.clone()
    views = make(regime, images, draws)

    first, second, heavier_first, heavier_second = (Draws.of(columns) for columns in drawn)
    standard_1, standard_2 = STANDARD.apply(before, first), STANDARD.apply(before, second)
    assert_equal(views.standard_1, standard_1, "v")
    assert_equal(views.standard_2, standard_2, "v'")
    assert_equal(views.heavy_1, HEAVY.apply(standard_1, heavier_first), "v̂")
    assert_equal(views.heavy_2, HEAVY.apply(standard_2, heavier_second), "v̂'")
    assert_equal(images, before, "the images")
    for one, other in itertools.combinations(views, 2):
        assert not torch.equal(one, other)


class Wrong(RandAugment):
    """An augmentation of one's own that counts its numbers wrongly."""

    def __init__(self) -> None:
        super().__init__(2, 9)
        self.columns -= 1


@pytest.mark.parametrize(
    "maker",
    [
        ViewMaker(Chain(STANDARD, Wrong()), HEAVY, "baseline"),
        ViewMaker(Wrong(), HEAVY, "baseline"),
        ViewMaker(STANDARD, Wrong(), "dssl"),
    ],
)
def test_an_augmentation_that_counts_its_numbers_wrongly_is_named(maker: ViewMaker) -> None:
    width = RandAugment(2, 9).columns
    message = (
        rf"Wrong\.draw gives numbers of shape \(4, {width}\); its columns says \(4, {width - 1}"
    )
    with pytest.raises(ValueError, match=message):
        maker.draw(4, IMAGE_SIZE, generator_for("views", 0))


def test_all_regimes_share_their_standard_views(images: Tensor) -> None:
    """And joint and dssl all four: they differ in the loss."""
    baseline, joint, dssl = (make(regime, images, draw(regime, 3, 2, 1)) for regime in REGIMES)
    for views in (joint, dssl):
        assert_equal(views.standard_1, baseline.standard_1, "v")
        assert_equal(views.standard_2, baseline.standard_2, "v'")
    assert_equal(joint.heavy_1, dssl.heavy_1, "v̂")
    assert_equal(joint.heavy_2, dssl.heavy_2, "v̂'")


def test_any_step_can_be_drawn_again_and_none_equals_another() -> None:
    """Whatever ran before it: the steps in order, and backwards."""
    keys = list(itertools.product((0, 1), (1, 2), (0, 1)))  # seed, epoch, step
    forwards = {key: draw("dssl", *key) for key in keys}
    backwards = {key: draw("dssl", *key) for key in reversed(keys)}
    for key in keys:
        assert torch.equal(forwards[key], backwards[key])
    for one, other in itertools.combinations(keys, 2):
        assert not torch.equal(forwards[one], forwards[other])


# Seeding -----------------------------------------------------------------------------------------


def numbers(purpose: str, *key: int) -> list[int]:
    generator = generator_for(purpose, *key)
    return torch.randint(2**62, (4,), generator=generator).tolist()


def test_every_purpose_and_key_has_a_stream_of_its_own() -> None:
    """Small keys and large ones, in all places: no stream shares a number with another."""
    purposes = ("views", "order", "probe", "probe order", "picture", "")
    keys = [*itertools.product((0, 1, 2, 10, 2**31, 2**32 - 1), range(9), (0, 1, 2, 100))]
    # Keys of other lengths, which zeros at their end must not make equal.
    keys += [key for length in (0, 1, 2, 4, 5) for key in itertools.product((0, 1), repeat=length)]
    drawn = [number for key in keys for purpose in purposes for number in numbers(purpose, *key)]
    assert len(set(drawn)) == len(drawn)


def test_streams_do_not_depend_on_the_process() -> None:
    """A new process has another hash seed and other global generators."""
    program = (
        "import torch\n"
        "from common.runtime.seeding import epoch_order, generator_for\n"
        "torch.manual_seed(12345)\n"
        "for key in ((0, 1, 2), (2**40, 7, 0)):\n"
        "    print(*torch.randint(2**62, (4,), generator=generator_for('views', *key)).tolist())\n"
        "print(*epoch_order(20, 0, 3).tolist())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "54321"}
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [numbers("views", 0, 1, 2), numbers("views", 2**40, 7, 0)]
    expected.append(epoch_order(20, 0, 3).tolist())
    assert [[*map(int, line.split())] for line in finished.stdout.splitlines()] == expected


def test_epoch_order_visits_every_image_once() -> None:
    orders = [epoch_order(50, seed, epoch) for seed, epoch in itertools.product((0, 1), (1, 2, 3))]
    for order in orders:
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(50))
    for one, other in itertools.combinations(orders, 2):
        assert not torch.equal(one, other)
    assert torch.equal(epoch_order(50, 0, 1), orders[0])


# The picture -------------------------------------------------------------------------------------

LABEL_HEIGHT, BORDER = 18, 4  # pixels above a row of cells, and around each cell


def cells(picture: Image.Image, rows: int, columns: int, side: int) -> Iterator[Image.Image]:
    """Row by row; the picture's size has to fit them exactly."""
    pitch = side + BORDER
    row_height = LABEL_HEIGHT + pitch + BORDER
    assert picture.size == (columns * pitch + BORDER, rows * row_height)
    for row, column in itertools.product(range(rows), range(columns)):
        left, top = BORDER + column * pitch, row * row_height + LABEL_HEIGHT + BORDER
        yield picture.crop((left, top, left + side, top + side))


@pytest.mark.parametrize(
    ("size", "side", "count", "columns", "regime"),
    [
        (32, 96, 16, 10, "dssl"),  # three times as large; ten images at most
        (32, 96, 12, 10, "baseline"),
        (40, 80, 3, 3, "joint"),
        (224, 224, 2, 2, "dssl"),
    ],
)
def test_cells_show_the_views_enlarged(
    size: int, side: int, count: int, columns: int, regime: Regime
) -> None:
    source = pictures(count, (size, size))
    maker = ViewMaker(RandomResizedCropFlip(size, (0.2, 1)), HEAVY, regime)
    views = maker.make(source, maker.draw(count, (size, size), generator_for("picture", 0)))
    rows = [source, *(view for view in views if view is not None)]
    expected = [
        image.resize((side, side), Image.Resampling.NEAREST)
        for row in rows
        for image in to_pillow(row)[:columns]
    ]
    shown = [*cells(picture_views(source, views), len(rows), columns, side)]
    assert_equal(to_tensor(shown), to_tensor(expected), "cells")


def test_images_of_another_size_are_brought_to_the_views() -> None:
    source = pictures(2, (64, 48))
    view = pictures(2, (32, 32), seed=1)
    picture = picture_views(source, Views(view, view, None, None))
    nearest = source[:, :, 0::2][:, :, :, [column * 48 // 32 for column in range(32)]]
    shown = [*cells(picture, 3, 2, 96)][:2]
    expected = [image.resize((96, 96), Image.Resampling.NEAREST) for image in to_pillow(nearest)]
    assert_equal(to_tensor(shown), to_tensor(expected), "the images' row")


def test_rows_are_labelled_on_white() -> None:
    view = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    picture = picture_views(view, Views(view, view, view, view))
    labels = []
    for top in range(0, picture.height, LABEL_HEIGHT + 96 + 2 * BORDER):
        label = picture.crop((0, top, picture.width, top + LABEL_HEIGHT))
        assert label.getpixel((0, 0)) == (255, 255, 255)
        assert label.convert("L").getextrema()[0] < 50
        labels.append(label.tobytes())
    assert len(set(labels)) == 5
