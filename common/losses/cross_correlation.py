"""Barlow Twins' loss on the cross-correlation of two views' projections.

Zbontar et al., *Barlow Twins: Self-Supervised Learning via Redundancy Reduction*, 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.runtime.ranks import Ranks


def cross_correlation_loss(
    z_1: Tensor, z_2: Tensor, off_diagonal_weight: float, ranks: Ranks
) -> Tensor:
    """Σᵢ(1 − Cᵢᵢ)² + λ Σᵢ≠ⱼ Cᵢⱼ², C `[d, d]` the cross-correlation of z_1 and z_2 (equation 1).

    C = z̃₁ᵀ z̃₂ / N, where z̃ is z with each dimension standardised over the N images of the global
    batch as BatchNorm does (biased variance, ε = 1e-5). Gradient to both; a target is passed
    detached. Computed in float32, under autocast too.

    C itself is never made: at d = 8192 it takes 256 MiB, and as much again for its gradient. Since
    Σᵢⱼ Cᵢⱼ² = Σ (z̃₁z̃₁ᵀ ∘ z̃₂z̃₂ᵀ) / N², two `[N, N]` matrices of inner products between images are
    enough, which for N < d are smaller and take fewer operations.

    Args:
        z_1, z_2: projections of both views, float `[B, d]`, this rank's share.
        off_diagonal_weight: λ, 0 or more.
        ranks: whose shares make the global batch; every rank computes the whole loss of it, so
            that DDP's mean over the ranks gives the gradient of that loss.

    Returns:
        float32 scalar, the same on every rank.
    """
    with torch.autocast(z_1.device.type, enabled=False):  # it would multiply matrices in bf16
        z_1, z_2 = (standardise(ranks.join_batch(z.float())) for z in (z_1, z_2))
        diagonal = (z_1 * z_2).mean(dim=0)  # Cᵢᵢ, [d]
        squares = ((z_1 @ z_1.T) * (z_2 @ z_2.T)).sum() / len(z_1) ** 2  # Σᵢⱼ Cᵢⱼ²
        off_diagonal = squares - diagonal.square().sum()
        return (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal


def standardise(z: Tensor) -> Tensor:
    """Each column of float `[N, d]`, N at least 2, to mean 0 and standard deviation 1."""
    return F.batch_norm(z, None, None, training=True)
