"""SimSiam's pair loss; the directional sum over views is `common/dssl.py`'s."""

from __future__ import annotations

from torch import Tensor

from common.losses.cosine import negative_cosine


def pair_loss(p: Tensor, z: Tensor) -> Tensor:
    """½D(p, z): moves predictions p `[B, d]` towards projections z `[B, d]`; float32 scalar."""
    return 0.5 * negative_cosine(p, z)
