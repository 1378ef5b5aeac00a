"""Which images a backbone finds alike: evidence that needs no labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.training.training import Training

SAMPLE = 2000  # images at most, among which neighbours are searched
QUERIES = 10  # images that are shown, one a row
NEAREST = 8  # neighbours of each
CELL = 96  # least side of an image in the picture, in pixels


def sample(count: int) -> Tensor:
    """The images among which neighbours are searched: int64, at most 2,000, evenly spaced.

    Evenly, since the images of a folder come class by class.
    """
    return torch.linspace(0, count - 1, min(SAMPLE, count)).round().long()


def show_neighbours(training: Training, images: Tensor, features: Tensor) -> None:
    """Save neighbours.png, and show the images by their features in TensorBoard's projector.

    Args:
        images: uint8 `[N, 3, S, S]`.
        features: of these images, float `[N, d]`; with fewer than 2 images nothing is shown.
    """
    if len(images) < 2 or not training.ranks.is_main:
        return
    images, features, epoch = images.cpu(), features.cpu(), training.last_epoch
    training.log.picture("neighbours", picture_neighbours(images, features), epoch)
    training.log.features(features, images, epoch)


def nearest(features: Tensor, queries: Tensor, count: int) -> Tensor:
    """The nearest images by cosine similarity, an image itself left out.

    Args:
        features: float `[N, d]`, of any norm.
        queries: int64 `[Q]`, rows of `features`.
        count: neighbours of each, at most N − 1.

    Returns:
        int64 `[Q, count]`, the nearest first.
    """
    directions = F.normalize(features.float(), dim=1)
    similarity = directions[queries] @ directions.T
    similarity.scatter_(1, queries[:, None], -torch.inf)
    return similarity.topk(count, dim=1).indices


def picture_neighbours(images: Tensor, features: Tensor) -> Image.Image:
    """A row for each of ten images: the image, then a gap, then its eight nearest ones.

    Args:
        images: uint8 `[N, 3, S, S]` on the CPU, at least 2.
        features: of these images, float `[N, d]`.
    """
    count = min(NEAREST, len(images) - 1)
    queries = torch.linspace(0, len(images) - 1, min(QUERIES, len(images))).long()
    found = nearest(features.cpu(), queries, count)
    enlarge = max(1, -(-CELL // images.shape[2]))
    rows = []
    for query, neighbours in zip(queries.tolist(), found.tolist(), strict=True):
        shown = images[[query, *neighbours]]
        shown = shown.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
        cells = F.pad(shown, (4, 4, 4, 4), value=255)
        gap = cells.new_full((3, cells.shape[2], 12), 255)
        rows.append(torch.cat([cells[0], gap, *cells[1:]], dim=2))
    return Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
