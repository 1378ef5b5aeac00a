"""Photographs that do not fit into memory: decoded once in a worker, two crops cut from each.

Only the crops, 8-bit, leave the worker; all that follows is batched on the training device.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.datasets import (
    BROKEN,
    SHAPES_TEST,
    SHAPES_TRAIN,
    decode,
    label_by_folder,
    list_images,
    require_batch,
)
from common.distributed import Ranks
from common.errors import UserError
from common.image_ops import Augmentation, draw_crops
from common.seeding import epoch_order, generator_for
from common.shapes import CLASS_NAMES, shapes
from common.views import ViewMaker, Views

Photograph = Path | Tensor  # a file, or uint8 `[3, H, W]`


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
    return PhotographSet(files, *label_by_folder(folder, files))


def read(photograph: Photograph) -> Tensor:
    """uint8 `[3, H, W]`.

    Raises:
        BROKEN: if the file cannot be decoded.
    """
    if isinstance(photograph, Tensor):
        return photograph
    return torch.from_numpy(np.array(decode(photograph))).permute(2, 0, 1)


def crop(photograph: Tensor, box: Sequence[float], size: int) -> Tensor:
    """Cut (top, left, height, width) out of uint8 `[3, H, W]`, resize to uint8 `[3, size, size]`.

    Bilinear, antialiased; torch's 8-bit kernel is within 1 of Pillow's result.
    """
    top, left, height, width = (int(edge) for edge in box)
    part = photograph[None, :, top : top + height, left : left + width]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


class TwoCrops(Dataset):
    """Two random crops of each photograph: uint8 `[2, 3, size, size]`, by (epoch, index).

    An item depends on its epoch, its index and the seed alone.

    Args:
        size: of a crop, pixels.
        scale: least and greatest area of a crop, as a share of the photograph's.
        seed: of the crops.
        whole: applied to the whole photograph before each crop, drawn anew for each.
        skip_broken: in place of a file that cannot be decoded, take the next one that can.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        size: int,
        scale: tuple[float, float],
        seed: int,
        whole: Augmentation | None,
        skip_broken: bool,
    ) -> None:
        self.photographs = photographs
        self.size = size
        self.scale = scale
        self.seed = seed
        self.whole = whole
        self.skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, key: tuple[int, int]) -> Tensor | str:
        """The crops; or what is wrong with the file, since exceptions leave a worker garbled."""
        epoch, index = key
        photograph = self._read(index)
        if isinstance(photograph, str):
            return photograph
        crops = []
        for view in range(2):
            generator = generator_for("crop", self.seed, epoch, index, view)
            shown = photograph
            if self.whole is not None:
                shown = self.whole(photograph[None], generator)[0]
            box = draw_crops(1, (shown.shape[1], shown.shape[2]), self.scale, generator)[0]
            crops.append(crop(shown, box.tolist(), self.size))
        return torch.stack(crops)

    def examples(self, view_maker: ViewMaker, count: int = 10) -> tuple[Tensor, Views]:
        """The first photographs, squeezed to uint8 `[count, 3, size, size]`, and views of them.

        Raises:
            UserError: if one of them cannot be decoded.
        """
        count = min(count, len(self))
        photographs = [self._read(index) for index in range(count)]
        items = [self[0, index] for index in range(count)]
        first, second = stack_or_raise(items)
        generator = generator_for("picture", self.seed)
        draws = view_maker.draw(count, (self.size, self.size), generator)
        shown = [crop(image, (0, 0, *image.shape[1:]), self.size) for image in photographs]
        return torch.stack(shown), view_maker.make(first, draws, second)

    def _read(self, index: int) -> Tensor | str:
        problem = ""
        for attempt in range(len(self) if self.skip_broken else 1):
            source = self.photographs[(index + attempt) % len(self)]
            try:
                return read(source)
            except BROKEN as error:
                problem = f"{source} cannot be decoded ({error})"
        return problem


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This rank's share of each batch of some steps of an epoch: keys for `TwoCrops`."""

    def __init__(self, count: int, batch_size: int, seed: int, ranks: Ranks) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.rows = ranks.share(batch_size)
        self.epoch = 0
        self.steps = range(0)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = epoch_order(self.count, self.seed, self.epoch)
        for step in self.steps:
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch[self.rows].tolist()]


class CropLoader:
    """Loads batches of crop pairs, `[2, B, 3, size, size]`, in worker processes.

    Args:
        crops: what to load.
        batch_size: global.
        workers: of this rank; 0 loads in the process itself, below 0 divides the machine's cores.
    """

    def __init__(
        self, crops: TwoCrops, batch_size: int, seed: int, workers: int, ranks: Ranks
    ) -> None:
        if workers < 0:
            workers = max(1, (os.cpu_count() or 1) // ranks.per_machine)
        self.ranks = ranks
        self.batches = EpochBatches(len(crops), batch_size, seed, ranks)
        self.loader = DataLoader(
            crops,
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=ranks.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_leave_signals_to_the_run,
        )

    def epoch(
        self, epoch: int, first_step: int, steps: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (step, crops of view 1, crops of view 2) for the steps first_step..steps − 1.

        Crops are uint8 `[B, 3, size, size]` on the device.

        Raises:
            UserError: if a file cannot be decoded.
        """
        self.batches.epoch, self.batches.steps = epoch, range(first_step, steps)
        for step, items in zip(self.batches.steps, self.loader, strict=True):
            first, second = stack_or_raise(items).to(self.ranks.device, non_blocking=True)
            yield step, first, second


def stack_or_raise(items: Tensor | list[Tensor | str]) -> Tensor:
    """Crops `[2, B, 3, size, size]` of items of `TwoCrops`.

    Raises:
        UserError: if one of them says that a file cannot be decoded.
    """
    stacked = _stack(items) if isinstance(items, list) else items
    if isinstance(stacked, str):
        raise UserError(f"{stacked}; mend or remove it, or leave such files out with --skip-broken")
    return stacked


def _stack(items: list[Tensor | str]) -> Tensor | str:
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack(items, dim=1)


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C reaches workers too; the run decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
