"""Draws docs/method.png: an image, its two standard views, and the heavy view made from each.

python docs/draw_method.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.augment.cifar10 import standard_augmentation
from common.augment.randaugment import RandAugment
from common.data.shapes import shapes
from common.runtime.seeding import generator_for
from common.views import ViewMaker

SIZE = 200  # of a view, pixels
GAP = 120
MARGIN = 40
INK, SOFT = "black", (120, 120, 120)


def main() -> None:
    images, _ = shapes(3, SIZE, seed=4)
    maker = ViewMaker(standard_augmentation(SIZE), RandAugment(2, 9), "dssl")
    image = images[2:3]
    draws = maker.draw(1, (SIZE, SIZE), generator_for("figure", 3))
    v, v_prime, heavy, heavy_prime = (to_picture(view) for view in maker.make(image, draws))

    width = 3 * SIZE + 2 * GAP + 2 * MARGIN
    height = 2 * SIZE + GAP + 2 * MARGIN + 10
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(24), ImageFont.load_default(17)
    left, middle, right = (MARGIN + column * (SIZE + GAP) for column in range(3))
    top, bottom = MARGIN + 30, MARGIN + 30 + SIZE + GAP
    centre = (top + bottom) // 2

    def place(picture: Image.Image, x: int, y: int, name: str) -> None:
        canvas.paste(picture, (x, y))
        draw.text((x + SIZE / 2, y - 6), name, INK, font, anchor="mb")

    place(to_picture(image), left, centre, "image I")
    place(v, middle, top, "standard view v = t(I)")
    place(v_prime, middle, bottom, "standard view v' = t'(I)")
    place(heavy, right, top, "heavy view of v")
    place(heavy_prime, right, bottom, "heavy view of v'")

    edge = SIZE + 10
    for y in (top, bottom):
        arrow(draw, (left + edge, centre + SIZE / 2), (middle - 10, y + SIZE / 2), SOFT, width=2)
        # The loss: a heavy view's prediction is pulled towards its own standard view only.
        arrow(draw, (right - 10, y + SIZE / 2), (middle + edge, y + SIZE / 2), "crimson", width=5)
        text = (middle + SIZE + GAP / 2, y + SIZE / 2 + 14)
        draw.text(text, "asymmetric", "crimson", small, anchor="mt")
    x = middle + SIZE / 2 - 30
    arrow(draw, (x, top + SIZE + 12), (x, bottom - 42), "royalblue", width=5, both=True)
    draw.text(
        (x + 14, (top + SIZE + bottom - 30) / 2), "symmetric", "royalblue", small, anchor="lm"
    )
    canvas.save(Path(__file__).with_name("method.png"), optimize=True)


def to_picture(view: Tensor) -> Image.Image:
    return Image.fromarray(view[0].permute(1, 2, 0).contiguous().numpy())


def arrow(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str | tuple[int, int, int],
    width: int,
    both: bool = False,
) -> None:
    along = torch.tensor(end) - torch.tensor(start)
    along = along / along.norm()
    across = torch.tensor([-along[1], along[0]])
    head = 6.0 + 2 * width
    draw.line([start, end], colour, width)
    for tip, sign in [(torch.tensor(end), 1)] + [(torch.tensor(start), -1)] * both:
        base = tip - sign * head * along
        corners = [tip, base + 0.5 * head * across, base - 0.5 * head * across]
        draw.polygon([tuple(corner.tolist()) for corner in corners], colour)


if __name__ == "__main__":
    main()
