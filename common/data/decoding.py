"""Image files to 8-bit RGB pixels."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision announces a release without it; Pillow then decodes all
    decode_image = None

if TYPE_CHECKING:
    from common.data.archive import Entry

BITS_PER_SAMPLE = 258  # a tag of the TIFF format
LONGEST = 64  # of a longer side, in shorter sides; what is beyond is not looked at


def shown(path: os.PathLike[str] | str) -> str:
    """A path or name for a message: bytes that are not UTF-8 are written as `\\x..`."""
    return os.fsencode(path).decode(errors="backslashreplace")


class BrokenFile(Exception):  # noqa: N818 (the file is what is wrong)
    """An image file that cannot be decoded; the message names it and says why."""


def content_of(file: Path | Entry) -> np.ndarray:
    """The bytes of a file, on disk or in an archive, uint8 `[size]`.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    return np.fromfile(file, np.uint8) if isinstance(file, Path) else file.read()


def decode(file: Path | Entry) -> Tensor:
    """Decode an image file, on disk or in an archive, to RGB.

    torchvision decodes JPEGs, to the same values as Pillow, which decodes all else.
    16-bit values are scaled to 8 bits, transparency is dropped, and the orientation that a
    camera noted (EXIF) is ignored.

    Returns:
        uint8 `[3, H, W]`, the channels last in memory.

    Raises:
        BrokenFile: if the file is missing or damaged, has more pixels than Pillow accepts (about
            179 million; nothing is decoded then), or pixel values of neither 8 nor 16 bits.
    """
    try:
        content = content_of(file)
        with Image.open(io.BytesIO(content)) as source:  # reads the header only
            # torchvision's PNG decoder crashes on damaged files, its GIF decoder accepts some.
            if source.format == "JPEG" and decode_image is not None:
                with suppress(RuntimeError):  # damaged, or a rare kind: Pillow decides
                    return decode_image(torch.from_numpy(content), ImageReadMode.RGB)
            return torch.from_numpy(np.array(_to_rgb(source))).permute(2, 0, 1)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise BrokenFile(
            f"{shown(file)} cannot be decoded (not an image of a known kind)"
        ) from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        reason = str(error) or type(error).__name__
        raise BrokenFile(f"{shown(file)} cannot be decoded ({reason})") from error


def _to_rgb(source: Image.Image) -> Image.Image:
    bits = {8}
    if source.format == "TIFF":
        bits = set(source.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    # Pillow also calls 16-bit PNG and PPM "I".
    is_deep = source.mode == "I" and source.format not in ("PNG", "PPM")
    if source.mode == "F" or is_deep or not bits <= {1, 2, 4, 8, 16}:
        raise ValueError("its pixel values are neither of 8 nor of 16 bits")
    if source.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        return Image.fromarray((np.asarray(source) // 257).astype(np.uint8)).convert("RGB")
    image = source
    if "transparency" in source.info:
        image = source.convert("RGBA")  # Pillow warns when it converts such a palette at once
    return image.convert("RGB")


def without_ends(pixels: Tensor) -> Tensor:
    """An image `[3, H, W]` without what is far from the centre of a side of over `LONGEST` others.

    Evaluation uses only the centre; resized whole, 1 × 10,000 pixels would take gigabytes.
    """
    height, width = pixels.shape[1:]
    most = LONGEST * min(height, width)
    top, left = (max(0, length - most) // 2 for length in (height, width))  # as much at both ends
    return pixels[:, top : height - top, left : width - left]


def square(pixels: Tensor, size: int) -> Tensor:
    """Resize an image, uint8 `[3, H, W]`, to `[3, size, size]`.

    As by torchvision's Resize (shorter side, bicubic) and CenterCrop, to the bit; very long images
    are cut before.
    """
    if pixels.shape[1:] == (size, size):
        return pixels
    pixels = without_ends(pixels)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    shorter = min(image.size)
    width, height = (int(size * length / shorter) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
