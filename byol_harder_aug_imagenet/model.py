"""BYOL's online network for ImageNet; the target network is a copy (`common/networks/ema.py`)."""

from __future__ import annotations

from common.networks.byol import BYOL
from common.networks.resnet import Depth, imagenet_resnet


def online_network(architecture: Depth, hidden_dim: int, projector_dim: int) -> BYOL:
    """BYOL over torchvision's ResNet; arguments as in `BYOL`."""
    return BYOL(imagenet_resnet(architecture), hidden_dim, projector_dim)
