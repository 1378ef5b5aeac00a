"""A queue of keys: a contrastive loss takes its negatives from earlier batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """The last K keys, each of length 1; it starts with random directions.

    He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, 2020. Its
    buffers are `keys`, float32 `[K, d]`, and `position`, int64 `[]`, the row of the oldest key.

    Args:
        length: K.
        dimension: d.
    """

    def __init__(self, length: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dimension), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by new ones, in order, without waiting for the device.

        Args:
            keys: float `[N, d]`, N at most K, of the whole global batch, so that all ranks'
                queues stay the same.
        """
        rows = torch.arange(len(keys), device=self.keys.device).add(self.position)
        self.keys.index_copy_(0, rows.remainder_(len(self.keys)), keys.float())
        self.position.add_(len(keys)).remainder_(len(self.keys))
