"""SimSiam's network for CIFAR-10."""

from __future__ import annotations

from torch import nn

from common.networks.head import head
from common.networks.resnet import CifarDepth, CifarResNet
from common.networks.siamese import Siamese


class SimSiam(Siamese):
    """SimSiam over a ResNet for 32-px images.

    As in the authors' script the projector has two layers and every Linear a bias. The script
    also builds a third projector layer and never uses it; it is left out here.

    Args:
        architecture, width, stem_stride: of the backbone, see `CifarResNet`.
        projector_dim: d, the dimension of z and p.
        predictor_dim: the dimension of the predictor's hidden layer.
    """

    def __init__(
        self,
        architecture: CifarDepth,
        width: int,
        projector_dim: int,
        predictor_dim: int,
        stem_stride: int = 1,
    ) -> None:
        backbone = CifarResNet(architecture, width, stem_stride)
        d = projector_dim
        projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d),
            nn.BatchNorm1d(d, affine=False),
        )
        super().__init__(backbone, projector, head(d, predictor_dim, d))
