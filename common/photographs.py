"""Photographs that do not fit into memory: decoded once in a worker, two crops cut from each.

Only the crops, 8-bit, leave the worker; all that follows is batched on the training device.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.datasets import (
    BROKEN,
    SHAPES_TEST,
    SHAPES_TRAIN,
    broken_file,
    decode,
    label_by_folder,
    list_images,
    require_batch,
)
from common.distributed import Ranks, usable_cores
from common.errors import UserError
from common.image_ops import Augmentation, draw_crops
from common.memory import keep_freed_memory
from common.seeding import epoch_order, generator_for
from common.shapes import CLASS_NAMES, shapes
from common.views import ViewMaker, Views

Photograph = Path | Tensor  # a file, or uint8 `[3, H, W]`
# What is made of a photograph: crops uint8 `[3, size, size]`, or what is wrong with the file
# (exceptions leave a worker garbled), and the photograph's index.
Item = tuple[list[Tensor] | str, int]


class Files(Sequence[Path]):
    """Paths in one block of memory.

    A million Python objects would be copied into every loader worker, half a gigabyte each: a
    worker that merely looks at one changes its count of references.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.names = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(self.names[index]))


class PhotographSet(NamedTuple):
    """Photographs, with their labels and the classes' names, both empty where there are none."""

    photographs: Sequence[Photograph]
    labels: Sequence[int]
    class_names: tuple[str, ...]


def find_photographs(
    dataset: str, data_root: str, image_size: int, seed: int, at_least: int, split: str
) -> PhotographSet:
    """List a split of a data set; nothing is decoded yet.

    Args:
        dataset: "folder" (torchvision's ImageFolder layout, `train/<class>/*`, `val/<class>/*`; or
            images without labels) or "shapes" (generated from `seed` at `image_size`).
        at_least: how many photographs are needed: the batch.
        split: "train" or "val".

    Raises:
        UserError: if there are none, or too few.
    """
    if dataset == "shapes":
        count = SHAPES_TRAIN if split == "train" else SHAPES_TEST
        require_batch(count, at_least, dataset)
        images, labels = shapes(count, image_size, 2 * seed + (split != "train"))
        return PhotographSet(list(images), labels.tolist(), CLASS_NAMES)
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"--data-root {data_root}: no such folder")
    folder = root / split
    if not folder.is_dir():
        if split != "train":
            raise UserError(f"{root} has no {split}/ folder")
        folder = root
    files = list_images(folder)
    if not files:
        raise UserError(f"no images in {folder}")
    require_batch(len(files), at_least, str(folder))
    return PhotographSet(Files(files), *label_by_folder(folder, files))


def read(photograph: Photograph) -> Tensor:
    """uint8 `[3, H, W]`.

    Raises:
        BROKEN: if the file cannot be decoded.
    """
    if isinstance(photograph, Tensor):
        return photograph
    return torch.from_numpy(np.array(decode(photograph))).permute(2, 0, 1)


def resize(photograph: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 `[3, H, W]`, bilinear and antialiased; torch's kernel is within 1 of Pillow's.

    A decoded photograph's channels lie last in memory, and stay there: its fast case.
    """
    # The batch dimension goes in front of memory's first; photograph[None] is not seen as such.
    batch = photograph.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def crop(photograph: Tensor, box: Sequence[float], size: int) -> Tensor:
    """Cut (top, left, height, width) out of uint8 `[3, H, W]`; resized to `[3, size, size]`."""
    top, left, height, width = (int(edge) for edge in box)
    return resize(photograph[:, top : top + height, left : left + width], size, size)


class RandomCrops(Dataset):
    """Random crops of each photograph, by (epoch, index); an item depends on these and the seed.

    Args:
        count: crops of each photograph.
        size: of a crop, pixels.
        scale: least and greatest area of a crop, as a share of the photograph's.
        seed: of the crops.
        whole: applied to the whole photograph, whose size it keeps, anew before each crop.
        skip_broken: in place of a file that cannot be decoded, take the next one that can.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        count: int,
        size: int,
        scale: tuple[float, float],
        seed: int,
        skip_broken: bool,
        whole: Augmentation | None = None,
    ) -> None:
        self.photographs = photographs
        self.count = count
        self.size = size
        self.scale = scale
        self.seed = seed
        self.whole = whole
        self.skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """Crops, `count` of uint8 `[3, size, size]`, and the index of their photograph."""
        epoch, index = key
        photograph, used = self._read(index)
        if isinstance(photograph, str):
            return photograph, used
        generator = generator_for("crop", self.seed, epoch, index)
        size = (photograph.shape[1], photograph.shape[2])
        crops = []
        for box in draw_crops(self.count, size, self.scale, generator).tolist():
            shown = photograph
            if self.whole is not None:
                shown = self.whole(photograph[None], generator)[0]
            crops.append(crop(shown, box, self.size))
        return crops, used

    def examples(self, view_maker: ViewMaker, count: int = 10) -> tuple[Tensor, Views]:
        """The first photographs, squeezed to uint8 `[count, 3, size, size]`, and views of them.

        Raises:
            UserError: if one of them cannot be decoded.
        """
        count = min(count, len(self))
        photographs = [self._read(index)[0] for index in range(count)]
        (first, second), _ = unpack(stack([self[0, index] for index in range(count)]))
        generator = generator_for("picture", self.seed)
        draws = view_maker.draw(count, (self.size, self.size), generator)
        shown = [crop(image, (0, 0, *image.shape[1:]), self.size) for image in photographs]
        return torch.stack(shown), view_maker.make(first, draws, second)

    def _read(self, index: int) -> tuple[Tensor | str, int]:
        problem = ""
        for attempt in range(len(self) if self.skip_broken else 1):
            used = (index + attempt) % len(self)
            try:
                return read(self.photographs[used]), used
            except BROKEN as error:
                problem = broken_file(self.photographs[used], error, can_skip=not self.skip_broken)
        return problem, index


class CentreCrops(Dataset):
    """The evaluation view of each photograph, one crop uint8 `[3, size, size]`, by index.

    The shorter side is resized to 8/7 of `size` (256 for 224; bilinear, antialiased), as
    torchvision's Resize does, and the centre cut out.
    """

    def __init__(self, photographs: Sequence[Photograph], size: int) -> None:
        self.photographs = photographs
        self.size = size

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> Item:
        try:
            photograph = read(self.photographs[index])
        except BROKEN as error:
            return broken_file(self.photographs[index], error, can_skip=False), index
        shorter, resized = min(photograph.shape[1:]), round(self.size * 8 / 7)
        height, width = (int(resized * length / shorter) for length in photograph.shape[1:])
        view = resize(photograph, height, width)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return [view[:, top : top + self.size, left : left + self.size]], index


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


def unpack(batch: tuple[Tensor | str, Tensor]) -> tuple[Tensor, Tensor]:
    """Crops uint8 `[count, B, 3, size, size]` and indices int64 `[B]` of a loaded batch.

    Raises:
        UserError: if a file could not be decoded.
    """
    crops, indices = batch
    if isinstance(crops, str):
        raise UserError(crops)
    return crops, indices


def stack(items: list[Item]) -> tuple[Tensor | str, Tensor]:
    """A batch of items, to be unpacked by `unpack`; channels stay last in memory, as they come."""
    indices = torch.tensor([index for _, index in items])
    for crops, _ in items:
        if isinstance(crops, str):
            return crops, indices
    count = len(items[0][0])
    together = torch.stack([crops[k].permute(1, 2, 0) for k in range(count) for crops, _ in items])
    return together.permute(0, 3, 1, 2).unflatten(0, (count, len(items))), indices


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
