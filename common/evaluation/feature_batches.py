"""Features of photographs by a frozen backbone, in the batches that train a linear classifier."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from common.augment.base import Draws
from common.augment.crop import RandomFlip
from common.data.loader import CropLoader, Loading, load, tell_skipped
from common.data.photographs import CentreCrops, Photograph, RandomCrops
from common.data.workers import WorkerLoader
from common.evaluation.accuracy import EVALUATION_BATCH
from common.evaluation.classifier import Batches, batches_of_epoch
from common.runtime.errors import StopRequested, UserError
from common.runtime.ranks import Ranks, send
from common.runtime.seeding import generator_for
from common.training.signals import StopFlag

CROP_SCALE = (0.08, 1.0)  # area of a training crop, as a fraction of the photograph's


class BatchConfig(Protocol):
    """The settings that decide what is in a batch."""

    image_size: int
    workers: int
    skip_broken: bool
    batch_size: int
    seed: int


def centre_features(
    photographs: Sequence[Photograph],
    encode: Callable[[Tensor], Tensor],
    feature_dim: int,
    image_size: int,
    loading: Loading,
    ranks: Ranks,
    stop: StopFlag,
) -> tuple[Tensor, Tensor]:
    """Features of the centre crops of this rank's photographs: rank, rank + world_size, …

    Args:
        encode: uint8 `[B, 3, image_size, image_size]` on the device to float `[B, feature_dim]`.

    Returns:
        Features float `[n, feature_dim]` on the device, and int64 `[n]` on the CPU: the photograph
        that each is of, with `skip_broken` the next one in place of a broken file.

    Raises:
        UserError: if a file cannot be decoded, without `skip_broken`.
        StopRequested: on every rank, after a signal to any.
    """
    # Filled in place: joined at the end, many gigabytes would be there twice.
    count = len(range(ranks.rank, len(photographs), ranks.world_size))
    features = torch.empty(count, feature_dim, device=ranks.device)
    used = torch.empty(count, dtype=torch.int64)
    skipped: list[str] = []
    views = CentreCrops(photographs, image_size)
    done = 0
    for batch in feature_batches(views, encode, feature_dim, loading, ranks, stop):
        end = done + len(batch.used)
        features[done:end], used[done:end] = batch.features, batch.used
        skipped += batch.broken
        done = end
    tell_skipped(skipped, ranks)
    return features, used


def joined_features(
    batches: Iterable[FeatureBatch], count: int, feature_dim: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Features of all photographs, in the memory of the first rank's CPU.

    Args:
        batches: `feature_batches` of the `count` photographs, on every rank.

    Returns:
        On the first rank features float32 `[n, feature_dim]`, and int64 `[n]`: the photograph that
        each is of, in order. With `skip_broken` broken files are left out. On other ranks nothing.
    """
    # Filled in place: small tensors kept from each batch would cut up the memory that it frees.
    total = count if ranks.is_main else 0
    features, is_done = torch.empty(total, feature_dim), torch.zeros(total, dtype=torch.bool)
    done = first = 0
    for batch in batches:
        end = min(count, first + EVALUATION_BATCH * ranks.world_size)
        rows = ranks.gather(batch.features, end - first).cpu()
        used = ranks.gather(batch.used.to(ranks.device), end - first).cpu()
        if ranks.is_main:
            own = used == torch.arange(first, end)  # not of the next file after a broken one
            is_done[first:end] = own
            rows = rows[own]
            features[done : done + len(rows)] = rows
            done += len(rows)
        first = end
    return features[:done], is_done.nonzero().flatten()


class FeatureBatch(NamedTuple):
    """A batch of a rank's features; empty where a rank has none left and others still do."""

    features: Tensor  # float `[n, feature_dim]`, on the device
    used: Tensor  # int64 `[n]` on the CPU: the photograph that each is of
    broken: list[str]  # about each file that could not be decoded


def feature_batches(
    views: CentreCrops,
    encode: Callable[[Tensor], Tensor],
    feature_dim: int,
    loading: Loading,
    ranks: Ranks,
    stop: StopFlag,
) -> Iterator[FeatureBatch]:
    """Features of this rank's photographs, as many batches on every rank.

    Args:
        views: one of each photograph.
        encode: uint8 views `[B, 3, size, size]` on the device to float `[B, feature_dim]`.

    Raises:
        UserError: if a file cannot be decoded, without `skip_broken`.
        StopRequested: on every rank, after a signal to any.
    """
    loader = _loader(views, loading, ranks)
    bar = tqdm(loader, "features", disable=not ranks.is_main, leave=False)
    batches = iter(bar)
    remedy = (
        "restore the file or remove it, or if it is a training image, repeat the command with "
        "--skip-broken"
    )
    for _ in range(-(-len(views) // (EVALUATION_BATCH * ranks.world_size))):
        loaded = next(batches, None)
        problem = "" if loaded is None else loaded.problem(loading.skip_broken, remedy)
        if ranks.any(stop.requested or problem != ""):
            if ranks.any(problem != ""):  # on every rank: none waits for one that has ended
                raise UserError(problem or "another process met a file that cannot be decoded")
            again = "Stopped while features were extracted: the same command extracts them again."
            raise StopRequested(stop.exit_status, again)
        if loaded is None:
            empty = torch.empty(0, feature_dim, device=ranks.device)
            yield FeatureBatch(empty, torch.empty(0, dtype=torch.int64), [])
        else:
            features = encode(loaded.crops[0].to(ranks.device, non_blocking=True))
            yield FeatureBatch(features, loaded.indices, loaded.broken)
    bar.close()


def require_room(
    photographs: Sequence[Photograph], image_size: int, loading: Loading, ranks: Ranks
) -> None:
    """Refuse to begin where `centre_features` of photographs would not fit later.

    Raises:
        UserError: if the shared memory has no room for the batches.
    """
    _loader(CentreCrops(photographs, image_size), loading, ranks)


def _loader(views: CentreCrops, loading: Loading, ranks: Ranks) -> WorkerLoader:
    """Loads every world_size-th of the views; its processes start with the first batch."""
    mine = range(ranks.rank, len(views), ranks.world_size)
    size = max(1, min(EVALUATION_BATCH, len(mine)))
    return load(views, loading, ranks, size, sampler=mine, batch_size=size)


def cropped_batches(
    photographs: Sequence[Photograph],
    labels: Tensor,
    encode: Callable[[Tensor], Tensor],
    config: BatchConfig,
    ranks: Ranks,
    stop: StopFlag,
) -> Batches:
    """The protocol's training views: a random crop and a flip of each photograph.

    Args:
        labels: int64 `[N]`, on the device.
        encode: uint8 views `[B, 3, size, size]` on the device to float `[B, d]`.
        stop: set where a file cannot be decoded, unless the config says `skip_broken`.
    """
    crops = RandomCrops(photographs, 1, config.image_size, CROP_SCALE, config.seed)
    loading = Loading(config.workers, skip_broken=config.skip_broken)
    # Thousands at once would fill a GPU, and a worker would need seconds for them.
    at_once = EVALUATION_BATCH
    loader = CropLoader(crops, config.batch_size, loading, ranks, at_once)
    steps = steps_of(len(photographs), config, ranks)
    flip, size = RandomFlip(), (config.image_size, config.image_size)

    def batches(epoch: int, first_step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        loaded = loader.epoch(epoch, first_step, steps)
        for step, pieces in itertools.groupby(loaded, key=itemgetter(0)):
            count = loader.batches.count(step)
            generator = generator_for("linear", config.seed, epoch, step)
            draws = flip.draw(count, size, generator)[ranks.share(count)].split(at_once)
            features, own = [], []
            for piece, (_, (images,), indices) in zip(draws, pieces, strict=True):
                images = flip.apply(images, Draws.of(piece, images.device))
                features.append(encode(images))
                own.append(indices)
            if loader.must_stop:
                stop.fail()
            yield step, torch.cat(features), labels[send(torch.cat(own), labels.device)]

    return batches


def cached_batches(features: Tensor, labels: Tensor, config: BatchConfig, ranks: Ranks) -> Batches:
    """Batches of float features `[N, d]` and int64 labels `[N]`, in `cropped_batches`' order.

    A batch's features are valid until the next one, which is written into the same memory: to take
    new memory for each costs more than the copy itself.
    """
    memory = features.new_empty(config.batch_size // ranks.world_size, features.shape[1])

    def batches(epoch: int, first_step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, batch, rows in batches_of_epoch(
            len(features), config.batch_size, config.seed, ranks, epoch, first_step
        ):
            index = send(batch[rows], features.device)
            x = torch.index_select(features, 0, index, out=memory[: len(index)])
            yield step, x, labels.index_select(0, index)

    return batches


def steps_of(count: int, config: BatchConfig, ranks: Ranks) -> int:
    """Steps of an epoch: with a last, smaller batch, unless the ranks cannot share it."""
    whole, rest = divmod(count, config.batch_size)
    return whole + (rest >= ranks.world_size)
