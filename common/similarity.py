"""The similarity that SimSiam and BYOL maximise."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) = −cos(p, sg(z)), mean over the batch: moves p towards z.

    Args:
        p: predictions, float `[B, d]`.
        z: targets, float `[B, d]`; the stop-gradient sg acts here.

    Returns:
        float32 scalar, −1 (aligned) .. 1.
    """
    return -F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()
