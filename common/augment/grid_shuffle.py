"""GridShuffle: the tiles of an image change places."""

from __future__ import annotations

import torch
from torch import Tensor

from common.augment.base import Augmentation, Draws


class GridShuffle(Augmentation):
    """Cut an image into grid × grid tiles, which change places by a uniform permutation.

    A tile has ⌊H/grid⌋ × ⌊W/grid⌋ pixels; rows and columns beyond the last whole tile stay.
    """

    def __init__(self, grid: int) -> None:
        self.grid = grid
        # For each place, row by row: the tile that moves there.
        self.columns = grid * grid

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        order = torch.rand(batch, self.columns, generator=generator).argsort(dim=1)
        return order.to(torch.float32)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        batch, channels = images.shape[:2]
        grid = self.grid
        height, width = images.shape[2] // grid, images.shape[3] // grid
        covered = (..., slice(grid * height), slice(grid * width))
        tiles = images[covered].reshape(batch, channels, grid, height, grid, width)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, grid², 3, height, width]
        image = torch.arange(batch, device=images.device)[:, None]
        tiles = tiles[image, draws.device.to(torch.int64)].unflatten(1, (grid, grid))
        shuffled = images.clone()
        shuffled[covered] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(images[covered].shape)
        return shuffled
