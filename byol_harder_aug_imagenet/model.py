"""BYOL's online network for ImageNet; the target network is a copy (`common/networks/ema.py`)."""

from __future__ import annotations

from common.networks.head import head
from common.networks.resnet import Depth, imagenet_resnet
from common.networks.siamese import Siamese


def online_network(architecture: Depth, hidden_dim: int, projector_dim: int) -> Siamese:
    """BYOL over torchvision's ResNet.

    Args:
        architecture: of the backbone.
        hidden_dim: the dimension of the hidden layers of projector and predictor.
        projector_dim: d, the dimension of z and p.
    """
    backbone = imagenet_resnet(architecture)
    projector = head(backbone.feature_dim, hidden_dim, projector_dim)
    return Siamese(backbone, projector, head(projector_dim, hidden_dim, projector_dim))
