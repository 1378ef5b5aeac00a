"""A step's images: which ones, of which rank and with which key; and the views made of them."""

from __future__ import annotations

import pytest
import torch

from common.augment.base import Chain, Draws
from common.augment.colour import RandomGrey
from common.augment.crop import RandomFlip
from common.augment.randaugment import RandAugment
from common.data.batches import Batch, ImageBatches, PhotographBatches
from common.data.in_memory import ImageSet
from common.data.loader import Loading
from common.data.photographs import RandomCrops
from common.runtime.ranks import Ranks
from common.runtime.seeding import epoch_order, generator_for
from common.views import ViewMaker

SEED, SIZE = 5, (12, 12)
IMAGES = torch.randint(
    256, (23, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
CROPS = RandomCrops(list(IMAGES), 2, 8, (0.2, 1.0), SEED)


def second_step(source: str, epoch: int, ranks: Ranks) -> Batch:
    if source == "in memory":
        batches = ImageBatches(ImageSet(IMAGES), 8, SEED, ranks)
    else:
        batches = PhotographBatches(CROPS, "", 8, Loading(0), ranks)
    (batch,) = batches.epoch(epoch, 1, 2)
    return batch


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("source", ["in memory", "photographs"])
def test_each_rank_has_its_share_of_the_epoch_s_order(
    source: str, epoch: int, world_size: int
) -> None:
    every = [Ranks(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    batches = [second_step(source, epoch, ranks) for ranks in every]
    share = 8 // world_size
    for rank, batch in enumerate(batches):
        assert batch.key == (SEED, epoch, 1)
        assert batch.count == 8
        assert batch.rows == slice(rank * share, (rank + 1) * share)
    images = torch.cat([batch.images for batch in batches])
    index = epoch_order(23, SEED, epoch)[8:16]
    if source == "in memory":
        assert torch.equal(images, IMAGES[index])
        assert all(batch.other is None for batch in batches)
        return
    first, second = zip(*(CROPS[epoch, i].crops for i in index.tolist()), strict=True)
    assert torch.equal(images, torch.stack(first))
    assert torch.equal(torch.cat([batch.other for batch in batches]), torch.stack(second))


@pytest.mark.parametrize("has_second_crop", [False, True])
def test_a_rank_s_views_are_its_rows_of_the_global_batch_s(has_second_crop: bool) -> None:
    standard, heavy = Chain(RandomFlip(), RandomGrey(0.5)), RandAugment(2, 9)
    first, second = IMAGES[:8], IMAGES[8:16] if has_second_crop else IMAGES[:8]
    generator = generator_for("views", SEED, 3, 1)
    drawn = [augmentation.draw(8, SIZE, generator) for augmentation in [standard] * 2 + [heavy] * 2]
    views = [standard.apply(first, Draws.of(drawn[0])), standard.apply(second, Draws.of(drawn[1]))]
    views += [heavy.apply(views[k], Draws.of(drawn[2 + k])) for k in range(2)]
    for rows in (slice(0, 4), slice(4, 8)):
        other = second[rows] if has_second_crop else None
        batch = Batch(first[rows], other, (SEED, 3, 1), 8, rows)
        made = ViewMaker(standard, heavy, "dssl").views(batch)
        for ours, whole in zip(made, views, strict=True):
            assert torch.equal(ours, whole[rows])
