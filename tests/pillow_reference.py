"""RandAugment's sixteen operations as Pillow computes them, one image at a time.

`common/augment/operations.py` has to equal it bit for bit. It is written for plainness rather than
speed. It also makes the pictures for the tests, so that they need no data set.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Generator, Tensor

CUTOUT_COLOUR = (125, 123, 114)


class Strength(NamedTuple):
    """An operation's range: M = 0 gives low, M = 30 gives high."""

    low: float
    high: float
    signed: bool = False  # whether the value's sign is drawn, + or - with probability 1/2


STRENGTHS: dict[str, Strength] = {
    "AutoContrast": Strength(0, 1),
    "Equalize": Strength(0, 1),
    "Invert": Strength(0, 1),
    "Rotate": Strength(0, 30, signed=True),
    "Posterize": Strength(0, 4),
    "Solarize": Strength(0, 256),
    "SolarizeAdd": Strength(0, 110),
    "Color": Strength(0.1, 1.9),
    "Contrast": Strength(0.1, 1.9),
    "Brightness": Strength(0.1, 1.9),
    "Sharpness": Strength(0.1, 1.9),
    "ShearX": Strength(0, 0.3, signed=True),
    "ShearY": Strength(0, 0.3, signed=True),
    "Cutout": Strength(0, 40),
    "TranslateX": Strength(0, 100, signed=True),
    "TranslateY": Strength(0, 100, signed=True),
}
WITHOUT_STRENGTH = ("AutoContrast", "Equalize", "Invert")


def strength(name: str, magnitude: int) -> float:
    """The unsigned value of magnitude M, 0..30."""
    low, high, _ = STRENGTHS[name]
    return low + magnitude / 30 * (high - low)


# The operations ---------------------------------------------------------------------------------


def affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Pillow's defaults are the specification here: nearest neighbour, black fill."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def posterize(image: Image.Image, value: float) -> Image.Image:
    return ImageOps.posterize(image, max(1, int(value)))


def solarize_add(image: Image.Image, value: float) -> Image.Image:
    brighter = image.point([min(255, level + int(value)) for level in range(256)] * 3)
    return ImageOps.solarize(brighter, 128)


def cutout(image: Image.Image, value: float, centre: Sequence[float]) -> Image.Image:
    width, height = image.size
    left = int(max(0, centre[0] - value / 2))
    top = int(max(0, centre[1] - value / 2))
    box = (left, top, min(width, left + value), min(height, top + value))
    result = image.copy()
    ImageDraw.Draw(result).rectangle(box, CUTOUT_COLOUR)
    return result


OPERATIONS: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Rotate": lambda image, value: image.rotate(value),
    "Posterize": posterize,
    "Solarize": lambda image, value: ImageOps.solarize(image, value),
    "SolarizeAdd": solarize_add,
    "Color": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "Contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    "Brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "Sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
    "ShearX": lambda image, value: affine(image, (1, value, 0, 0, 1, 0)),
    "ShearY": lambda image, value: affine(image, (1, 0, 0, value, 1, 0)),
    "Cutout": cutout,
    "TranslateX": lambda image, value: affine(image, (1, 0, value, 0, 1, 0)),
    "TranslateY": lambda image, value: affine(image, (1, 0, 0, 0, 1, value)),
}


def operate(name: str, images: Tensor, value: float, centres: Tensor | None = None) -> Tensor:
    """One operation with one signed value on every image of a batch; centres for Cutout alone."""
    operation = OPERATIONS[name]
    if centres is None:
        return to_tensor([operation(image, value) for image in to_pillow(images)])
    pairs = zip(to_pillow(images), centres.tolist(), strict=True)
    return to_tensor([operation(image, value, centre) for image, centre in pairs])


def rand_augment(images: Tensor, draws: Tensor, magnitude: int, names: Sequence[str]) -> Tensor:
    """Redo drawn operations; each takes four columns: index into names, sign, centre x, y."""
    results = []
    for image, row in zip(to_pillow(images), draws.tolist(), strict=True):
        for start in range(0, len(row), 4):
            index, sign, *centre = row[start : start + 4]
            name = names[int(index)]
            value = strength(name, magnitude) * (sign if STRENGTHS[name].signed else 1)
            further = (centre,) if name == "Cutout" else ()
            image = OPERATIONS[name](image, value, *further)
        results.append(image)
    return to_tensor(results)


# Between tensors and Pillow ---------------------------------------------------------------------


def to_pillow(images: Tensor) -> list[Image.Image]:
    """uint8 [B, 3, H, W] to B Pillow images."""
    return [Image.fromarray(image.numpy()) for image in images.permute(0, 2, 3, 1).contiguous()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pillow images of one size to uint8 [B, 3, H, W]."""
    width, height = images[0].size
    joined = bytearray(b"".join(image.tobytes() for image in images))
    pixels = torch.frombuffer(joined, dtype=torch.uint8)
    return pixels.view(len(images), height, width, 3).permute(0, 3, 1, 2).contiguous()


# Pictures ---------------------------------------------------------------------------------------
# Each maker returns float [3, H, W] in 0..255. Real pictures come first, then those on which
# histogram operations degenerate.

Size = tuple[int, int]  # height, width


def photograph(size: Size, generator: Generator) -> Tensor:
    """Octaves of noise that fade with their frequency, a gradient, sharp-edged shapes, grain."""
    picture = torch.zeros(3, *size)
    for octave in range(1, 6):
        # Most of a photograph's contrast is shared by its three channels.
        grey = torch.randn(1, 1, 2**octave, 2**octave, generator=generator)
        colour = torch.randn(1, 3, 2**octave, 2**octave, generator=generator)
        noise = F.interpolate(grey + 0.4 * colour, size, mode="bilinear", align_corners=False)
        picture += 60 * 0.6**octave * noise[0]
    rows = torch.linspace(-1, 1, size[0])[:, None]
    columns = torch.linspace(-1, 1, size[1])[None, :]
    slope = 40 * torch.randn(2, 3, 1, 1, generator=generator)
    picture += 128 + slope[0] * rows + slope[1] * columns
    for _ in range(2):
        row, column = (2 * torch.rand(2, generator=generator) - 1).tolist()
        radius = float(0.1 + 0.4 * torch.rand(1, generator=generator))
        disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        picture = torch.where(disc, random_levels(3, generator), picture)
        box = ((rows + row).abs() < radius) & ((columns + column).abs() < radius / 2)
        picture = torch.where(box, random_levels(3, generator), picture)
    return picture + 3 * torch.randn(3, *size, generator=generator)


def random_levels(count: int, generator: Generator) -> Tensor:
    """Whole levels 0..255, [count, 1, 1]."""
    return torch.randint(256, (count, 1, 1), generator=generator).float()


def dark(size: Size, generator: Generator) -> Tensor:
    return 0.15 * photograph(size, generator)


def pale(size: Size, generator: Generator) -> Tensor:
    """Low contrast: only some twenty levels occur, none near black or white."""
    return 150 + 0.08 * photograph(size, generator)


def overexposed(size: Size, generator: Generator) -> Tensor:
    """Much of it at 0 and at 255."""
    return 3 * photograph(size, generator) - 200


def grey(size: Size, generator: Generator) -> Tensor:
    return photograph(size, generator).mean(0, keepdim=True).expand(3, -1, -1)


def white_noise(size: Size, generator: Generator) -> Tensor:
    return torch.randint(256, (3, *size), generator=generator).float()


def all_levels(size: Size, generator: Generator) -> Tensor:
    """Every level 0..255 in each channel, in its own random places (where the size suffices)."""
    count = size[0] * size[1]
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(3)])
    return (order % 256).float().view(3, *size)


def flat(size: Size, generator: Generator) -> Tensor:
    return random_levels(3, generator).expand(3, *size)


def black(size: Size, generator: Generator) -> Tensor:
    return torch.zeros(3, *size)


def white(size: Size, generator: Generator) -> Tensor:
    return torch.full((3, *size), 255.0)


def two_levels(size: Size, generator: Generator) -> Tensor:
    """Each channel holds two levels, in a random proportion."""
    first, second = random_levels(3, generator), random_levels(3, generator)
    share = torch.rand(3, 1, 1, generator=generator)
    return torch.where(torch.rand(3, *size, generator=generator) < share, first, second)


def black_and_white(size: Size, generator: Generator) -> Tensor:
    return 255 * torch.randint(2, (1, *size), generator=generator).float().expand(3, -1, -1)


def neighbouring_levels(size: Size, generator: Generator) -> Tensor:
    """Half the pixels at grey n, half at n + 1: Contrast's mean is at the edge of rounding."""
    level = random_levels(1, generator).clamp(max=254)
    count = size[0] * size[1]
    half = (torch.randperm(count, generator=generator) < count // 2).float()
    return (level + half.view(1, *size)).expand(3, -1, -1)


def equalize_edge(size: Size, generator: Generator) -> Tensor:
    """254, 255 and 510 pixels below the top level: Equalize's step becomes 0, 1 and 2."""
    count = size[0] * size[1]
    below = torch.tensor([254, 255, 510])[:, None]
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(3)])
    return torch.where(order < below, order % 100, 200).float().view(3, *size)


MAKERS = (
    photograph,
    dark,
    overexposed,
    pale,
    photograph,
    two_levels,
    white_noise,
    grey,
    equalize_edge,
    neighbouring_levels,
    all_levels,
    flat,
    black,
    white,
    black_and_white,
)


def pictures(count: int, size: Size, seed: int = 0) -> Tensor:
    """uint8 [count, 3, H, W]: the makers in turn, so that a few show all kinds."""
    generator = Generator().manual_seed(seed)
    made = [MAKERS[index % len(MAKERS)](size, generator) for index in range(count)]
    return torch.stack(made).clamp(0, 255).to(torch.uint8)
