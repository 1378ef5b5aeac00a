"""BYOL's pair loss; the directional sum over views is `common/dssl.py`'s."""

from __future__ import annotations

from torch import Tensor

from common.losses.cosine import negative_cosine


def pair_loss(p: Tensor, xi: Tensor) -> Tensor:
    """½D(p, ξ): moves predictions p `[B, d]` towards target projections ξ `[B, d]`; a scalar."""
    return 0.5 * negative_cosine(p, xi)
