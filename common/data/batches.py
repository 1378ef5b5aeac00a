"""The images of a training step, in one form for images in memory and for photographs."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol

from torch import Tensor

from common.data.in_memory import ImageSet
from common.data.loader import CropLoader, Loading
from common.data.photographs import RandomCrops
from common.runtime.ranks import Ranks
from common.runtime.seeding import epoch_order


class Batch(NamedTuple):
    """This rank's share of a step's images."""

    images: Tensor  # uint8 [B, 3, H, W] on the training device
    other: Tensor | None  # another crop of the same images, for the second view; None: the same
    key: tuple[int, int, int]  # seed, epoch and step, for the random numbers of its views
    count: int  # images of the global batch
    rows: slice  # of them, those of this rank


class Batches(Protocol):
    """Where a run's images come from.

    Attributes:
        fingerprint: identifies the images (`common.data.fingerprint`).
        must_stop: whether a file could not be decoded, so that the run has to stop after the step.
    """

    fingerprint: str
    must_stop: bool

    def __len__(self) -> int:
        """How many images there are."""

    def epoch(self, epoch: int, first_step: int, steps: int) -> Generator[Batch, None, None]:
        """The batches of the steps first_step..steps − 1 of an epoch, in its random order.

        They depend on the seed and the epoch only, and a last partial batch is left out.
        """

    def examples(self, count: int) -> tuple[Tensor, Batch]:
        """The first `count` images as uint8 `[count, 3, S, S]`, and a batch of them."""


class ImageBatches:
    """Batches of images that are kept in memory.

    Args:
        images: uint8 `[N, 3, S, S]`, on the training device.
        batch_size: global.
        seed: of the order.
    """

    must_stop = False

    def __init__(self, images: ImageSet, batch_size: int, seed: int, ranks: Ranks) -> None:
        self.fingerprint = images.fingerprint
        self.images = images.images
        self.batch_size = batch_size
        self.seed = seed
        self.rows = ranks.share(batch_size)

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, epoch: int, first_step: int, steps: int) -> Generator[Batch, None, None]:
        order = epoch_order(len(self.images), self.seed, epoch).to(self.images.device)
        for step in range(first_step, steps):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            key = (self.seed, epoch, step)
            yield Batch(self.images[index[self.rows]], None, key, self.batch_size, self.rows)

    def examples(self, count: int) -> tuple[Tensor, Batch]:
        shown = self.images[:count]
        return shown, Batch(shown, None, (self.seed, 0, 0), len(shown), slice(None))


class PhotographBatches:
    """Batches of two random crops of each photograph, cut by worker processes.

    Args:
        crops: two of each photograph.
        fingerprint: of the photographs.
        batch_size: global.
        loading: worker processes and their settings.
    """

    def __init__(
        self,
        crops: RandomCrops,
        fingerprint: str,
        batch_size: int,
        loading: Loading,
        ranks: Ranks,
    ) -> None:
        self.fingerprint = fingerprint
        self.crops = crops
        self.batch_size = batch_size
        self.rows = ranks.share(batch_size)
        self.loader = CropLoader(crops, batch_size, loading, ranks)

    @property
    def must_stop(self) -> bool:
        return self.loader.must_stop

    def __len__(self) -> int:
        return len(self.crops)

    def epoch(self, epoch: int, first_step: int, steps: int) -> Generator[Batch, None, None]:
        for step, (first, second), _ in self.loader.epoch(epoch, first_step, steps):
            key = (self.crops.seed, epoch, step)
            yield Batch(first, second, key, self.batch_size, self.rows)

    def examples(self, count: int) -> tuple[Tensor, Batch]:
        """As `Batches.examples`.

        Raises:
            UserError: if a photograph and all after it cannot be decoded.
        """
        shown, (first, second) = self.crops.examples(count)
        return shown, Batch(first, second, (self.crops.seed, 0, 0), len(shown), slice(None))
