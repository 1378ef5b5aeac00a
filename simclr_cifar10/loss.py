"""SimCLR's pair loss; its L_S is NT-Xent, the directional sum over views `common/dssl.py`'s.

The paper applies its rule to SimCLR without a formula or a script. The form of the asymmetric loss
(InfoNCE of v̂ against the batch's v, of v̂' against its v') and its weight of ½ are this project's
reading.
"""

from __future__ import annotations

from torch import Tensor

from common.losses.contrastive import info_nce
from common.runtime.ranks import Ranks


def pair_loss(p: Tensor, z: Tensor, temperature: float, ranks: Ranks) -> Tensor:
    """L_A, ½ InfoNCE: moves p = ẑ towards its image's sg(z), away from the other images' sg(z)."""
    return 0.5 * info_nce(p, z, temperature, ranks)
