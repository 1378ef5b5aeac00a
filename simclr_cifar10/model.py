"""SimCLR's network for CIFAR-10."""

from __future__ import annotations

from torch import Tensor, nn

from common.networks.head import head
from common.networks.resnet import CifarDepth, CifarResNet


class SimCLR(nn.Module):
    """Backbone f, projector g: images `[B, 3, H, W]` to z = g(f(x)), float `[B, d]`.

    The projector's form and widths are this project's choice: the authors published no script.

    Args:
        architecture, width, stem_stride: of the backbone.
        hidden_dim: of the projector.
        projector_dim: d, of z.
    """

    def __init__(
        self,
        architecture: CifarDepth,
        width: int,
        hidden_dim: int,
        projector_dim: int,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.backbone = CifarResNet(architecture, width, stem_stride)
        self.projector = head(self.backbone.feature_dim, hidden_dim, projector_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))
