"""MoCo v2's pair loss; the directional sum over views is `common/dssl.py`'s.

The paper applies its rule to MoCo v2 without a formula or a script. The form of the asymmetric loss
(InfoNCE of a heavy view's query against its own standard view's key, with the same queue) and its
weight of ½ are this project's reading.
"""

from __future__ import annotations

from torch import Tensor

from common.losses.contrastive import info_nce_with_queue


def pair_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """½ InfoNCE: moves queries towards their keys, away from the queue; arguments as there."""
    return 0.5 * info_nce_with_queue(q, k, queue, temperature)
