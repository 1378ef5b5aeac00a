"""A picture of a batch's views, for a look before the run."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from common.views import Views

PICTURED = 10  # images, one a column
CELL = 96  # least size of an image in the picture, pixels


def picture_views(images: Tensor, views: Views) -> Image.Image:
    """One column an image; rows: the image, its standard views, its heavy views.

    Args:
        images: uint8 `[B, 3, H, W]`; the first ten are shown.
        views: of the same images, square.
    """
    names = ["image", "standard view 1", "standard view 2", "heavy view 1", "heavy view 2"]
    rows = [images, *(view for view in views if view is not None)]
    size = views.standard_1.shape[2]
    enlarge = max(1, CELL // size)
    strips = []
    for row in rows:
        shown = row[:PICTURED].cpu()
        if shown.shape[2:] != (size, size):
            shown = torch.nn.functional.interpolate(shown, (size, size), mode="nearest")
        shown = shown.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
        strips.append(make_grid(shown, nrow=PICTURED, padding=4, pad_value=255))
    label_height = 18
    strip_height, width = strips[0].shape[1:]
    picture = Image.new("RGB", (width, len(strips) * (strip_height + label_height)), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, strip) in enumerate(zip(names, strips, strict=False)):
        top = index * (strip_height + label_height)
        draw.text((4, top + 4), name, fill="black")
        picture.paste(Image.fromarray(strip.permute(1, 2, 0).numpy()), (0, top + label_height))
    return picture
