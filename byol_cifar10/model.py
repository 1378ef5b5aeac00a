"""BYOL's online network for CIFAR-10; the target network is a copy (`common/networks/ema.py`)."""

from __future__ import annotations

from common.networks.byol import BYOL
from common.networks.resnet import CifarDepth, CifarResNet


def online_network(
    architecture: CifarDepth,
    width: int,
    hidden_dim: int,
    projector_dim: int,
    stem_stride: int = 1,
) -> BYOL:
    """BYOL over a ResNet for 32 px, with byol_harder_aug_imagenet's heads: this project's choice.

    Args:
        architecture, width, stem_stride: of the backbone.
        hidden_dim, projector_dim: of the heads, as in `BYOL`.
    """
    return BYOL(CifarResNet(architecture, width, stem_stride), hidden_dim, projector_dim)
