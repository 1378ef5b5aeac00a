"""Barlow Twins' losses; the directional sum over views is `common/dssl.py`'s.

The paper applies its rule to Barlow Twins without a formula or a script. The form of the asymmetric
loss (the symmetric one, with gradient to the heavy view alone) and its weight of ½ are this
project's reading.
"""

from __future__ import annotations

from torch import Tensor

from common.losses.cross_correlation import cross_correlation_loss
from common.runtime.ranks import Ranks


def pair_loss(p: Tensor, z: Tensor, off_diagonal_weight: float, ranks: Ranks) -> Tensor:
    """L_A, ½ of L_S with sg(z): correlates the dimensions of p = ẑ with those of z; a scalar."""
    return 0.5 * cross_correlation_loss(p, z.detach(), off_diagonal_weight, ranks)
