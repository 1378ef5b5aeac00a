"""Image files to 8-bit RGB pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def broken_file(path: Path, error: Exception, *, can_skip: bool) -> str:
    """The sentence about a file that cannot be decoded; `can_skip`: whether --skip-broken helps."""
    sentence = f"{path} cannot be decoded ({error}); mend or remove it"
    return f"{sentence}, or leave such files out with --skip-broken" if can_skip else sentence


def decode(path: Path) -> Image.Image:
    """Decode an image file to RGB; 16 bits a pixel are brought to 8, a palette's alpha is dropped.

    Raises:
        BROKEN: what Pillow raises on files that it cannot decode.
    """
    with Image.open(path) as source:
        if source.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(source) // 257).clip(0, 255).astype(np.uint8))
        elif "transparency" in source.info:
            image = source.convert("RGBA")
        else:
            image = source
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # converting an RGB image would copy it
        return image


def decode_square(path: Path, size: int) -> np.ndarray:
    """Decode an image file to RGB, uint8 `[size, size, 3]`.

    Another size is resized as torchvision's Resize (shorter side, bicubic) and CenterCrop do.
    """
    image = decode(path)
    if image.size != (size, size):
        shorter = min(image.size)
        width, height = (int(size * length / shorter) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.array(image)
