"""SimCLR's losses; the directional sum over views is `common/dssl.py`'s.

The paper applies its rule to SimCLR without a formula or a script. The form of the asymmetric loss
(InfoNCE against the standard views of the heavy view's own side) and its weight of ½ are this
project's reading.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses.cosine import cosines
from common.runtime.ranks import Ranks


def nt_xent(z_1: Tensor, z_2: Tensor, temperature: float, ranks: Ranks) -> Tensor:
    """L_S: an image's two projections find each other among all 2B of the global batch.

    Mean over anchors a of −log(exp(cos(a, a⁺)/τ) / Σ exp(cos(a, b)/τ)), the sum over the 2B − 1
    projections b other than a (Chen et al., *A Simple Framework for Contrastive Learning of Visual
    Representations*, 2020, equation 1). Gradient reaches anchors, positives and negatives.

    Args:
        z_1, z_2: projections of both views, float `[B, d]`, this rank's share; any length.
        temperature: τ, above 0.
        ranks: whose shares make the global batch.

    Returns:
        float32 scalar: the mean over this rank's anchors.
    """
    z = torch.stack([z_1, z_2], dim=1).flatten(0, 1).float()  # an image's two side by side
    logits = cosines(z, ranks.join_batch(z)) / temperature
    own = torch.arange(len(z), device=z.device) + ranks.rank * len(z)
    logits = logits.scatter(1, own[:, None], -torch.inf)
    return F.cross_entropy(logits, own ^ 1)  # 0 ↔ 1, 2 ↔ 3, …


def pair_loss(p: Tensor, z: Tensor, temperature: float, ranks: Ranks) -> Tensor:
    """L_A, ½ InfoNCE: moves p towards its own image's sg(z), away from the other images' sg(z).

    Mean over images i of −½ log(exp(cos(pᵢ, zᵢ)/τ) / Σⱼ exp(cos(pᵢ, zⱼ)/τ)), j over the global
    batch, i included.

    Args:
        p: ẑ, projections of heavy views, float `[B, d]`, this rank's share; any length.
        z: projections of their source views, likewise; the stop-gradient sg acts here.
        temperature: τ, above 0.
        ranks: whose shares make the global batch.

    Returns:
        float32 scalar: the mean over this rank's images.
    """
    logits = cosines(p, ranks.join_batch(z.detach().float())) / temperature
    own = torch.arange(len(p), device=p.device) + ranks.rank * len(p)
    return 0.5 * F.cross_entropy(logits, own)
