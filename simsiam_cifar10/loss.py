"""SimSiam's pair loss; the directional sum over views is `common/dssl.py`'s."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pull(p: Tensor, z: Tensor) -> Tensor:
    """½D(p, z) with D(p, z) = −cos(p, sg(z)), mean over the batch: moves p towards z.

    Args:
        p: predictions, float `[B, d]`.
        z: target projections, float `[B, d]`; the stop-gradient sg acts here.

    Returns:
        float32 scalar, −½ (aligned) .. ½.
    """
    return -0.5 * F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()
