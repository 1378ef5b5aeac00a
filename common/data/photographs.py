"""Photographs that do not fit into memory: a worker decodes each once and cuts crops from it.

The worker returns only the crops, 8-bit; all other steps are batched on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import data
from torch.utils.data import get_worker_info

from common.augment.crop import draw_crops
from common.augment.randaugment import RandAugment
from common.data.archive import Entry
from common.data.decoding import BrokenFile, decode, square, without_ends
from common.data.fingerprint import fingerprint, require_same_images
from common.data.listing import find_split, require_batch
from common.data.shapes import CLASS_NAMES, SPLITS, shapes_split
from common.data.stl10 import find_stl10
from common.runtime.errors import require
from common.runtime.ranks import Ranks
from common.runtime.seeding import generator_for

Dataset = Literal["folder", "stl10", "shapes"]
Photograph = Path | Entry | Tensor  # a file on disk or in an archive, or uint8 `[3, H, W]`

GIVE_UP_AFTER = 100  # broken files in a row: the disk may be gone


class PhotographSet(NamedTuple):
    """Photographs, with labels and the classes' names, both empty where there are none.

    Where only some photographs have labels, these come first, and `labels` is that much shorter.
    """

    photographs: Sequence[Photograph]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    fingerprint: str  # by `common.data.fingerprint`
    stray: str = ""  # without labels: an image that is in no class folder
    names: Sequence[str] = ()  # of files, relative to the split's folder


class Item(NamedTuple):
    """What is made of a photograph; `crops` is empty where no file can be decoded."""

    crops: list[Tensor]  # uint8 `[3, size, size]` each
    index: int  # of the photograph that was used
    broken: list[str]  # about each file that was tried before it


class Loaded(NamedTuple):
    """A batch of items. Errors are text: an exception from a worker carries its traceback."""

    crops: Tensor  # uint8 `[count, B, 3, size, size]`, or empty
    indices: Tensor  # int64 `[B]`
    broken: list[str]
    error: str  # why `crops` is empty

    def problem(self, skip_broken: bool, remedy: str) -> str:
        """Why work cannot go on after this batch; empty: it can.

        Args:
            remedy: what a user can do about a broken file.
        """
        if self.error or skip_broken or not self.broken:
            return self.error
        return f"{self.broken[0]}; {remedy}"


def find_photographs(
    dataset: Dataset,
    data_root: str,
    image_size: int,
    seed: int,
    at_least: int,
    split: str,
    ranks: Ranks,
    classes: str = "",
) -> PhotographSet:
    """List a split of a data set; nothing is decoded yet.

    Args:
        dataset: "folder" (torchvision's ImageFolder layout, `train/<class>/*`, `val/<class>/*`; or
            images without labels), "stl10" (see `find_stl10`) or "shapes" (generated from `seed` at
            `image_size`).
        data_root: the folder, or a zip archive of it.
        at_least: how many photographs are needed: the batch.
        split: "train" or "val", or "pretraining": the training images, and those without labels
            that a data set may have besides.
        ranks: every rank lists for itself; the first one reports.
        classes: a file that names the classes to use, of a folder; "": all.

    Raises:
        UserError: if there are none, or too few, the classes are not there, or the ranks found
            different ones.
    """
    require(
        not classes or dataset == "folder", "--classes has an effect with --dataset folder only"
    )
    if dataset == "stl10":
        images, labels, class_names = find_stl10(data_root, image_size, split, ranks)
        require_batch(len(images), at_least, dataset)
        names = [f"{dataset} {split} {index} {label}" for index, label in enumerate(labels)]
        names += [f"{dataset} {split} {index}" for index in range(len(labels), len(images))]
        found = fingerprint(names)
        require_same_images(found, data_root, ranks)
        return PhotographSet(images, labels, class_names, found)
    split = "val" if split == "val" else "train"
    if dataset == "shapes":
        require_batch(SPLITS[split], at_least, dataset)
        images, labels = shapes_split(split, image_size, seed)
        names = [f"{dataset} {split} {seed} {index}" for index in range(len(images))]
        return PhotographSet(list(images), labels.tolist(), CLASS_NAMES, fingerprint(names))
    listing = find_split(Path(data_root), split, ranks, at_least, classes)
    found = fingerprint(listing.names, listing.files)
    require_same_images(found, data_root, ranks)
    labelled = (listing.files, listing.labels, listing.class_names)
    return PhotographSet(*labelled, found, listing.stray, listing.names)


def resize(photograph: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 `[3, H, W]`, bilinear and antialiased; torch's kernel is within 1 of Pillow's.

    The channels of a decoded photograph are last in memory and stay last, which is the fast case.
    """
    # Written so that torch recognises the memory format; of photograph[None] it does not.
    batch = photograph.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def crop(photograph: Tensor, box: Sequence[float], size: int) -> Tensor:
    """Cut (top, left, height, width) out of uint8 `[3, H, W]`; resized to `[3, size, size]`."""
    top, left, height, width = (int(edge) for edge in box)
    return resize(photograph[:, top : top + height, left : left + width], size, size)


class Crops(data.Dataset):
    """Crops of photographs, `count` of uint8 `[3, size, size]` each."""

    def __init__(self, photographs: Sequence[Photograph], count: int, size: int) -> None:
        self.photographs = photographs
        self.count = count
        self.size = size

    def __len__(self) -> int:
        return len(self.photographs)

    @property
    def item_bytes(self) -> int:
        """Memory that the crops of one photograph take."""
        return self.count * 3 * self.size**2

    def read(self, index: int) -> tuple[Tensor | None, int, list[str]]:
        """A photograph uint8 `[3, H, W]`, or the next one that can be decoded.

        Returns:
            The photograph, or None after `GIVE_UP_AFTER` broken ones; the index of the one that
            was used; and a message about each broken one.
        """
        broken = []
        for attempt in range(min(len(self), GIVE_UP_AFTER)):
            used = (index + attempt) % len(self)
            try:
                photograph = self.photographs[used]
                if not isinstance(photograph, Tensor):
                    photograph = decode(photograph)
                return photograph, used, broken
            except BrokenFile as error:
                broken.append(str(error))
        return None, index, broken


class RandomCrops(Crops):
    """Random crops of each photograph, by (epoch, index); an item depends on these and the seed.

    In place of a file that cannot be decoded the next one that can is used.

    Args:
        count: crops of each photograph.
        size: of a crop, pixels.
        scale: least and greatest area of a crop, as a fraction of the photograph's.
        seed: of the crops.
        whole: applied to the whole photograph, whose size it keeps, with new random numbers for
            each crop.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        count: int,
        size: int,
        scale: tuple[float, float],
        seed: int,
        whole: RandAugment | None = None,
    ) -> None:
        super().__init__(photographs, count, size)
        self.scale = scale
        self.seed = seed
        self.whole = whole

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        photograph, used, broken = self.read(index)
        if photograph is None:
            return Item([], used, broken)
        generator = generator_for("crop", self.seed, epoch, index)
        size = (photograph.shape[1], photograph.shape[2])
        crops = []
        for box in draw_crops(self.count, size, self.scale, generator).tolist():
            source = photograph
            if self.whole is not None:
                source, box = self.whole.crop(photograph, box, generator), (0, 0, *box[2:])
            crops.append(crop(source, box, self.size))
        return Item(crops, used, broken)

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """The first photographs, resized to uint8 `[count, 3, size, size]`, and their crops.

        Returns:
            The photographs, and crops uint8 `[crops of each, count, 3, size, size]`.

        Raises:
            UserError: if one of them cannot be decoded, nor any after it.
        """
        count = min(count, len(self))
        loaded = stack([self[0, index] for index in range(count)])
        require(not loaded.error, loaded.error)
        photographs = [self.read(index)[0] for index in range(count)]
        shown = [crop(image, (0, 0, *image.shape[1:]), self.size) for image in photographs]
        return torch.stack(shown), loaded.crops.contiguous()


class CentreCrops(Crops):
    """The evaluation view of each photograph, one crop uint8 `[3, size, size]`, by index.

    The shorter side is resized to 8/7 of `size` (256 for 224; bilinear, antialiased), as
    torchvision's Resize does, and the centre is cut out. In place of a file that cannot be decoded
    the next one that can is used.
    """

    def __init__(self, photographs: Sequence[Photograph], size: int) -> None:
        super().__init__(photographs, 1, size)

    def __getitem__(self, index: int) -> Item:
        photograph, used, broken = self.read(index)
        crops = [] if photograph is None else [self.view(photograph)]
        return Item(crops, used, broken)

    def view(self, photograph: Tensor) -> Tensor:
        """The view `[3, size, size]` of a photograph, both uint8."""
        photograph = without_ends(photograph)
        shorter, resized = min(photograph.shape[1:]), round(self.size * 8 / 7)
        height, width = (int(resized * length / shorter) for length in photograph.shape[1:])
        view = resize(photograph, height, width)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return view[:, top : top + self.size, left : left + self.size]


class Squares(CentreCrops):
    """Whole photographs by index, cut square, as experiments on images in memory decode them."""

    def view(self, photograph: Tensor) -> Tensor:
        return square(photograph, self.size)


def stack(items: list[Item]) -> Loaded:
    """A batch of items; its channels stay last in memory, as they are after decoding."""
    indices = torch.tensor([item.index for item in items])
    broken = [message for item in items for message in item.broken]
    for item in items:
        if not item.crops:
            error = (
                f"{len(item.broken)} photographs in a row cannot be decoded: {item.broken[0]}; if "
                "the disk was gone, the same command continues when it is back"
            )
            return Loaded(torch.empty(0), indices, broken, error)
    crops = [item.crops[k].permute(1, 2, 0) for k in range(len(items[0].crops)) for item in items]
    memory = torch.empty(len(crops), *crops[0].shape, dtype=torch.uint8)
    if get_worker_info() is not None:  # moved here already, so that a failure can be reported
        try:
            memory.share_memory_()
        except RuntimeError as error:
            problem = f"a loader process got no shared memory ({error}); use --workers 0"
            return Loaded(torch.empty(0), indices, broken, problem)
    together = torch.stack(crops, out=memory).permute(0, 3, 1, 2)
    return Loaded(together.unflatten(0, (-1, len(items))), indices, broken, "")
