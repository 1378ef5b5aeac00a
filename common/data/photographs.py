"""Photographs that do not fit into memory: decoded once in a worker, crops cut from each.

Only the crops, 8-bit, leave the worker; all that follows is batched on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.augment.crop import draw_crops
from common.augment.randaugment import RandAugment
from common.data.decoding import BrokenFile, decode
from common.data.in_memory import SHAPES_TEST, SHAPES_TRAIN
from common.data.listing import Files, label_by_folder, list_images, require_batch
from common.data.shapes import CLASS_NAMES, shapes
from common.runtime.errors import UserError
from common.runtime.seeding import generator_for

Photograph = Path | Tensor  # a file, or uint8 `[3, H, W]`


# What is made of a photograph: crops uint8 `[3, size, size]`, or what is wrong with the file
# (exceptions leave a worker garbled), and the photograph's index.
Item = tuple[list[Tensor] | str, int]


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
        BrokenFile: if the file cannot be decoded.
    """
    if isinstance(photograph, Tensor):
        return photograph
    return decode(photograph)


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
        whole: RandAugment | None = None,
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
                shown, box = self.whole.crop(photograph, box, generator), (0, 0, *box[2:])
            crops.append(crop(shown, box, self.size))
        return crops, used

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """The first photographs, resized to uint8 `[count, 3, size, size]`, and their crops.

        Returns:
            The photographs, and crops uint8 `[crops of each, count, 3, size, size]`.

        Raises:
            UserError: if one of them cannot be decoded.
        """
        count = min(count, len(self))
        photographs = [self._read(index)[0] for index in range(count)]
        crops, _ = unpack(stack([self[0, index] for index in range(count)]))
        shown = [crop(image, (0, 0, *image.shape[1:]), self.size) for image in photographs]
        return torch.stack(shown), crops.contiguous()

    def _read(self, index: int) -> tuple[Tensor | str, int]:
        problem = ""
        for attempt in range(len(self) if self.skip_broken else 1):
            used = (index + attempt) % len(self)
            try:
                return read(self.photographs[used]), used
            except BrokenFile as error:
                problem = f"{error}; repair it or remove it"
                if not self.skip_broken:
                    problem += ", or leave such files out with --skip-broken"
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
        except BrokenFile as error:
            return f"{error}; repair it or remove it", index
        shorter, resized = min(photograph.shape[1:]), round(self.size * 8 / 7)
        height, width = (int(resized * length / shorter) for length in photograph.shape[1:])
        view = resize(photograph, height, width)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return [view[:, top : top + self.size, left : left + self.size]], index


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
