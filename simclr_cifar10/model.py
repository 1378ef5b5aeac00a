"""SimCLR's network for CIFAR-10."""

from __future__ import annotations

from common.networks.head import head
from common.networks.resnet import CifarDepth, CifarResNet
from common.networks.siamese import Siamese


class SimCLR(Siamese):
    """SimCLR over a ResNet for 32-px images: no predictor, so p is z.

    The authors published no script for this; the projector is this project's choice.

    Args:
        architecture, width, stem_stride: of the backbone, see `CifarResNet`.
        hidden_dim: the dimension of the projector's hidden layer.
        projector_dim: d, the dimension of z.
    """

    def __init__(
        self,
        architecture: CifarDepth,
        width: int,
        hidden_dim: int,
        projector_dim: int,
        stem_stride: int = 1,
    ) -> None:
        backbone = CifarResNet(architecture, width, stem_stride)
        super().__init__(backbone, head(backbone.feature_dim, hidden_dim, projector_dim))
