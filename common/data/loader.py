"""Batches of crops, loaded by worker processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from common.data.listing import first_of
from common.data.photographs import Crops, Loaded, RandomCrops, stack
from common.data.workers import WorkerLoader, require_shared_memory, start_worker
from common.runtime.cores import usable_cores
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from common.runtime.seeding import epoch_order


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This rank's share of each batch of some steps of an epoch: keys for `RandomCrops`.

    Args:
        photographs: how many there are.
        batch_size: global.
        at_once: a share comes in pieces of at most this many; None: whole.
    """

    def __init__(
        self, photographs: int, batch_size: int, seed: int, ranks: Ranks, at_once: int | None
    ) -> None:
        self.photographs = photographs
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self.at_once = at_once or batch_size
        self.epoch = 0
        self.steps = range(0)

    def count(self, step: int) -> int:
        """Photographs in a step; the last, smaller batch is cut to a multiple of the ranks."""
        count = min(self.batch_size, self.photographs - step * self.batch_size)
        return count - count % self.ranks.world_size

    def step_of_each(self) -> list[int]:
        """The step that each piece belongs to."""
        share = [self.count(step) // self.ranks.world_size for step in self.steps]
        pieces = [-(-count // self.at_once) for count in share]
        return [step for step, count in zip(self.steps, pieces, strict=True) for _ in range(count)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.photographs, self.seed, self.epoch)
        for step in self.steps:
            batch = order[step * self.batch_size :][self.ranks.share(self.count(step))]
            for piece in batch.split(self.at_once):
                yield [(self.epoch, index) for index in piece.tolist()]


@dataclass(frozen=True)
class Loading:
    """How a rank loads.

    Args:
        workers: processes; 0 loads in the rank itself, below 0 divides the machine's cores.
        prefetch: batches that each worker keeps ready.
        pin_memory: page-locked batches, with CUDA only.
        skip_broken: use the next file in place of one that cannot be decoded.
    """

    workers: int = -1
    prefetch: int = 4
    pin_memory: bool = True
    skip_broken: bool = False


class CropLoader:
    """Loads batches of crops in worker processes.

    Args:
        crops: what to load.
        batch_size: global.
        at_once: how many photographs of a rank are loaded together; None: its whole batch.

    Attributes:
        must_stop: whether a file could not be decoded, without `skip_broken`, or
            `GIVE_UP_AFTER` in a row. Other images took their place, so that all ranks can finish
            the step; then the run stops.

    Raises:
        UserError: if the shared memory has no room for the batches.
    """

    def __init__(
        self,
        crops: RandomCrops,
        batch_size: int,
        loading: Loading,
        ranks: Ranks,
        at_once: int | None = None,
    ) -> None:
        self.ranks = ranks
        self.skip_broken = loading.skip_broken
        self.must_stop = False
        self.batches = EpochBatches(len(crops), batch_size, crops.seed, ranks, at_once)
        most = min(batch_size // ranks.world_size, at_once or batch_size)
        self.loader = load(crops, loading, ranks, most, batch_sampler=self.batches)

    def epoch(
        self, epoch: int, first_step: int, steps: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (step, crops, indices) for the steps first_step..steps − 1, piece by piece.

        Crops are uint8 `[count, B, 3, size, size]` on the device; indices, of the photographs they
        are from, int64 `[B]` on the CPU. With `skip_broken`, the broken files are printed at the
        end of the epoch, or where the run stops in it.

        Raises:
            UserError: if no file can be decoded, from the first batch on.
        """
        self.batches.epoch, self.batches.steps = epoch, range(first_step, steps)
        skipped: list[str] = []
        before: Loaded | None = None
        try:
            for step, batch in zip(self.batches.step_of_each(), self.loader, strict=True):
                skipped += batch.broken
                problem = batch.problem(
                    self.skip_broken,
                    "the run stops here, and in this step the next file takes its place. Restore "
                    "the file, or continue with --skip-broken",
                )
                if batch.error:
                    # The disk may be gone: images of before let all ranks finish the step.
                    count = len(batch.indices)
                    if before is None or len(before.indices) < count:
                        raise UserError(problem)
                    batch = before._replace(
                        crops=before.crops[:, :count], indices=before.indices[:count]
                    )
                if problem and not self.must_stop:
                    self.must_stop = True
                    tqdm.write(f"error: {problem}", file=sys.stderr)
                before = batch
                crops = batch.crops.to(self.ranks.device, non_blocking=True)
                # Workers leave channels last, as decoded; the views want them first.
                yield step, crops.contiguous(), batch.indices
        finally:  # also where the run stops within the epoch
            if self.skip_broken:
                tell_skipped(skipped, self.ranks)


def tell_skipped(messages: Sequence[str], ranks: Ranks) -> None:
    """Print how many files this rank skipped, and the first messages about them."""
    different = [*dict.fromkeys(messages)]
    if different:
        where = f"process {ranks.rank}: " if ranks.world_size > 1 else ""
        tqdm.write(
            f"{where}broken files that were replaced by the next ones: {len(different)} "
            f"({first_of(different)})"
        )


def load(crops: Crops, loading: Loading, ranks: Ranks, most: int, **batching: Any) -> WorkerLoader:
    """A loader of items; what it yields are `Loaded`, with an error where there are no crops.

    Args:
        most: photographs in the largest batch of a rank.
        batching: DataLoader's `batch_sampler`, or `sampler` and `batch_size`.

    Raises:
        UserError: if the shared memory has no room for the batches.
    """
    workers = loading.workers
    if workers < 0:
        workers = max(1, usable_cores() // ranks.per_machine)
    require_shared_memory(crops.item_bytes * most, workers, loading.prefetch, ranks.per_machine)
    return WorkerLoader(
        crops,
        num_workers=workers,
        collate_fn=stack,
        pin_memory=loading.pin_memory and ranks.device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=loading.prefetch if workers else None,
        worker_init_fn=start_worker,
        **batching,
    )
