"""SimCLR's network for ImageNet."""

from __future__ import annotations

from common.networks.head import head
from common.networks.resnet import Depth, imagenet_resnet
from common.networks.siamese import Siamese


class SimCLR(Siamese):
    """SimCLR over torchvision's ResNet: no predictor, so p is z.

    Args:
        architecture: of the backbone.
        hidden_dim: the dimension of the projector's hidden layer.
        projector_dim: d, the dimension of z.
    """

    def __init__(self, architecture: Depth, hidden_dim: int, projector_dim: int) -> None:
        backbone = imagenet_resnet(architecture)
        super().__init__(backbone, head(backbone.feature_dim, hidden_dim, projector_dim))
