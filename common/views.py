"""Which views a regime makes of an image; each heavy view is derived from its standard view."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.augment.base import Augmentation, Draws
from common.data.batches import Batch
from common.runtime.seeding import generator_for

Regime = Literal["baseline", "joint", "dssl"]


class Views(NamedTuple):
    """Views of a batch, `[B, 3, H, W]` each; heavy ones are None in the baseline regime."""

    standard_1: Tensor  # v  = t(I)
    standard_2: Tensor  # v' = t'(I)
    heavy_1: Tensor | None  # v̂  = t̂(v)
    heavy_2: Tensor | None  # v̂' = t̂'(v')


class ViewMaker:
    """Makes the views of section 3 of the paper from 8-bit images.

    Args:
        standard: T, uint8 `[B, 3, H, W]` to the training size.
        heavy: T̂, applied to standard views.
        regime: baseline makes standard views only; joint and dssl also derive the heavy ones.
    """

    def __init__(self, standard: Augmentation, heavy: Augmentation, regime: Regime) -> None:
        self.standard = standard
        self.heavy = heavy
        self.regime = regime

    def compile(self) -> None:
        """`Augmentation.compile` both augmentations."""
        self.standard.compile()
        self.heavy.compile()

    def draw(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw for `batch` images of `size` (height, width): CPU float32 `[batch, columns]`.

        Standard views are drawn first, so that with one generator all regimes share them.
        """
        drawn = [self.standard.checked_draw(batch, size, generator) for _ in range(2)]
        if self.regime != "baseline":
            size = self.standard.output_size(size)
            drawn += [self.heavy.checked_draw(batch, size, generator) for _ in range(2)]
        return torch.cat(drawn, dim=1)

    def views(self, batch: Batch) -> Views:
        """Views of this rank's share of a batch, uint8 on its device.

        They are drawn for the whole global batch from its seed, epoch and step, so that the same
        images get the same views on one process or on several.
        """
        size = (batch.images.shape[2], batch.images.shape[3])
        draws = self.draw(batch.count, size, generator_for("views", *batch.key))
        return self.make(batch.images, draws[batch.rows], batch.other)

    def make(self, images: Tensor, draws: Tensor, other: Tensor | None = None) -> Views:
        """Views of uint8 images `[B, 3, H, W]` by CPU draws `[B, columns]`: uint8, same device.

        Args:
            other: another crop of the same images, for the second standard view.
        """
        sent = Draws.of(draws, images.device)
        # Both standard views in one batch, then both heavy ones: half as many calls.
        edge = 2 * self.standard.columns
        both = torch.cat([images, images if other is None else other])
        standard = self.standard.apply(both, sent.columns(0, edge).stacked())
        if self.regime == "baseline":
            return Views(*standard.chunk(2), None, None)
        heavy = self.heavy.apply(standard, sent.columns(edge, draws.shape[1]).stacked())
        return Views(*standard.chunk(2), *heavy.chunk(2))
