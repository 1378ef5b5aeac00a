"""SimSiam's network for CIFAR-10."""

from __future__ import annotations

from torch import Tensor, nn

from common.networks.head import head
from common.networks.resnet import CifarDepth, CifarResNet


class SimSiam(nn.Module):
    """Backbone f, projector g, predictor h: images `[B, 3, H, W]` to p = h(z) and z = g(f(x)).

    As in the authors' script the projector has two layers and every Linear a bias. Its third
    layer there is built and never used; it is left out here.

    Args:
        architecture, width, stem_stride: of the backbone.
        projector_dim: d, of z and p.
        predictor_dim: of the predictor's bottleneck.
    """

    def __init__(
        self,
        architecture: CifarDepth,
        width: int,
        projector_dim: int,
        predictor_dim: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = CifarResNet(architecture, width, stem_stride)
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, projector_dim),
            nn.BatchNorm1d(projector_dim),
            nn.ReLU(inplace=True),
            nn.Linear(projector_dim, projector_dim),
            nn.BatchNorm1d(projector_dim, affine=False),
        )
        self.predictor = head(projector_dim, predictor_dim, projector_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(self.backbone(images))
        p = self.predictor(z)
        return p, z  # [B, d] each
