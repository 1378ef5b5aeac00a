"""Contrastive losses: an image's two views are found among those of other images.

Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, 2020
(NT-Xent), and He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, 2020
(InfoNCE with a queue). All of them compute in float32, under autocast too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses.cosine import cosines
from common.runtime.ranks import Ranks


def nt_xent(z_1: Tensor, z_2: Tensor, temperature: float, ranks: Ranks) -> Tensor:
    """Each of the 2N projections of the global batch has to find the other one of its image.

    Mean over anchors a of −log(exp(cos(a, a⁺)/τ) / Σ exp(cos(a, b)/τ)), the sum over the 2N − 1
    projections b other than a (Chen et al., equation 1). Gradient to anchors, positives and
    negatives.

    Args:
        z_1, z_2: projections of both views, float `[B, d]`, this rank's share; of any norm.
        temperature: τ, above 0.
        ranks: whose shares make the global batch of N images.

    Returns:
        float32 scalar: the mean over this rank's anchors.
    """
    z = torch.stack([z_1, z_2], dim=1).flatten(0, 1).float()  # an image's two side by side
    logits = cosines(z, ranks.join_batch(z)) / temperature
    own = torch.arange(len(z), device=z.device) + ranks.rank * len(z)
    logits = logits.scatter(1, own[:, None], -torch.inf)
    return F.cross_entropy(logits, own ^ 1)  # 0 ↔ 1, 2 ↔ 3, …


def info_nce(q: Tensor, k: Tensor, temperature: float, ranks: Ranks) -> Tensor:
    """Each query has to find its own image's key among the keys of the global batch.

    Mean over images i of −log(exp(cos(qᵢ, kᵢ)/τ) / Σⱼ exp(cos(qᵢ, kⱼ)/τ)), j over the global
    batch, i included.

    Args:
        q: queries, float `[B, d]`, this rank's share; of any norm.
        k: their keys, likewise; no gradient reaches them.
        temperature: τ, above 0.
        ranks: whose shares make the global batch.

    Returns:
        float32 scalar: the mean over this rank's queries.
    """
    logits = cosines(q, ranks.join_batch(k.detach().float())) / temperature
    own = torch.arange(len(q), device=q.device) + ranks.rank * len(q)
    return F.cross_entropy(logits, own)


def info_nce_with_queue(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Each query has to find its own image's key among that key and a queue of other images'.

    Mean over images i of −log(exp(cos(qᵢ, kᵢ)/τ) / (exp(cos(qᵢ, kᵢ)/τ) + Σⱼ exp(cos(qᵢ, nⱼ)/τ))),
    j over the queue (He et al., equation 1). The other keys of the batch are no negatives.

    Args:
        q: queries, float `[B, d]`, of any norm.
        k: their keys, likewise; no gradient reaches them.
        queue: the negatives n, float32 `[K, d]`, each of norm 1; no gradient reaches them.
        temperature: τ, above 0.

    Returns:
        float32 scalar: the mean over the queries.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would multiply matrices in bf16
        q = F.normalize(q.float(), dim=1)
        positive = (q * F.normalize(k.detach().float(), dim=1)).sum(dim=1, keepdim=True)
        negative = q @ queue.detach().T
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.long))
