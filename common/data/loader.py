"""Batches of crops, loaded by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.photographs import RandomCrops, stack, unpack
from common.runtime.cores import usable_cores
from common.runtime.memory import keep_freed_memory
from common.runtime.ranks import Ranks
from common.runtime.seeding import epoch_order


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This rank's share of each batch of some steps of an epoch: keys for `RandomCrops`.

    Args:
        photographs: how many there are.
        batch_size: global.
        at_once: a share comes in pieces of at most so many; None: whole.
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
        """Photographs in a step: of the last, smaller batch as many as divide among the ranks."""
        count = min(self.batch_size, self.photographs - step * self.batch_size)
        return count - count % self.ranks.world_size

    def step_of_each(self) -> list[int]:
        """The step that each piece belongs to."""
        share = [self.count(step) // self.ranks.world_size for step in self.steps]
        pieces = [-(-count // self.at_once) for count in share]
        return [step for step, count in zip(self.steps, pieces, strict=True) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.step_of_each())

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
        pin_memory: page-locked batches, where a CUDA GPU trains.
    """

    workers: int = -1
    prefetch: int = 4
    pin_memory: bool = True


class CropLoader:
    """Loads batches of crops in worker processes.

    Args:
        crops: what to load.
        batch_size: global.
        seed: of the order.
        at_once: how many photographs of a rank are loaded together; None: its whole batch.
    """

    def __init__(
        self,
        crops: RandomCrops,
        batch_size: int,
        seed: int,
        loading: Loading,
        ranks: Ranks,
        at_once: int | None = None,
    ) -> None:
        self.ranks = ranks
        self.batches = EpochBatches(len(crops), batch_size, seed, ranks, at_once)
        self.loader = load(crops, loading, ranks, batch_sampler=self.batches)

    def epoch(
        self, epoch: int, first_step: int, steps: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (step, crops, indices) for the steps first_step..steps − 1, piece by piece.

        Crops are uint8 `[count, B, 3, size, size]` on the device; indices, of the photographs they
        are from, int64 `[B]` on the CPU.

        Raises:
            UserError: if a file cannot be decoded.
        """
        self.batches.epoch, self.batches.steps = epoch, range(first_step, steps)
        for step, batch in zip(self.batches.step_of_each(), self.loader, strict=True):
            crops, indices = unpack(batch)
            crops = crops.to(self.ranks.device, non_blocking=True)
            # Workers leave channels last, as decoded; what follows wants them apart.
            yield step, crops.contiguous(), indices


def load(dataset: Dataset, loading: Loading, ranks: Ranks, **batching: Any) -> DataLoader:
    """A loader of items; its batches are to be unpacked by `unpack`.

    Args:
        batching: DataLoader's `batch_sampler`, or `sampler` and `batch_size`.
    """
    workers = loading.workers
    if workers < 0:
        workers = max(1, usable_cores() // ranks.per_machine)
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=stack,
        pin_memory=loading.pin_memory and ranks.device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=loading.prefetch if workers else None,
        worker_init_fn=start_worker,
        **batching,
    )


def start_worker(worker: int) -> None:
    """What a worker does first."""
    keep_freed_memory()
    leave_signals_to_the_run()


def leave_signals_to_the_run() -> None:
    """Ctrl-C and torchrun's SIGTERM reach workers too; the run needs them until its checkpoint.

    One SIGTERM is let pass, so that the exit of the run can still end a worker by another.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
