"""The cosine similarity that all losses but Barlow Twins' are made of."""

from __future__ import annotations

import torch
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
    # Not −mean(): the sum's gradient needs one kernel less.
    return F.cosine_similarity(p.float(), z.detach().float(), dim=1).sum() / -len(p)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos of each a with each b; gradient to both.

    Args:
        a: float `[A, d]`, of any norm.
        b: float `[B, d]`, likewise.

    Returns:
        float32 `[A, B]`, −1..1, under autocast too.
    """
    with torch.autocast(a.device.type, enabled=False):  # it would multiply matrices in bf16
        return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T
