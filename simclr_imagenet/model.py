"""SimCLR's network for ImageNet."""

from __future__ import annotations

from torch import Tensor, nn

from common.networks.head import head
from common.networks.resnet import Depth, imagenet_resnet


class SimCLR(nn.Module):
    """Backbone f, projector g: images `[B, 3, H, W]` to z = g(f(x)), float `[B, d]`.

    Args:
        architecture: of the backbone, torchvision's.
        hidden_dim: of the projector.
        projector_dim: d, of z.
    """

    def __init__(self, architecture: Depth, hidden_dim: int, projector_dim: int) -> None:
        super().__init__()
        self.backbone = imagenet_resnet(architecture)
        self.projector = head(self.backbone.feature_dim, hidden_dim, projector_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))
