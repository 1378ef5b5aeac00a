"""BYOL's online network for CIFAR-10; the target network is a copy (`common/networks/ema.py`)."""

from __future__ import annotations

from common.networks.head import head
from common.networks.resnet import CifarDepth, CifarResNet
from common.networks.siamese import Siamese


def online_network(
    architecture: CifarDepth,
    width: int,
    hidden_dim: int,
    projector_dim: int,
    stem_stride: int = 1,
) -> Siamese:
    """BYOL over a ResNet for 32-px images.

    The authors published no script for this; the heads are those of byol_harder_aug_imagenet,
    this project's choice.

    Args:
        architecture, width, stem_stride: of the backbone, see `CifarResNet`.
        hidden_dim: the dimension of the hidden layers of projector and predictor.
        projector_dim: d, the dimension of z and p.
    """
    backbone = CifarResNet(architecture, width, stem_stride)
    projector = head(backbone.feature_dim, hidden_dim, projector_dim)
    return Siamese(backbone, projector, head(projector_dim, hidden_dim, projector_dim))
