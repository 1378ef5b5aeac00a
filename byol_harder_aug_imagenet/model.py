"""BYOL's online network for ImageNet; the target network is a copy (`common/ema.py`)."""

from __future__ import annotations

from torch import Tensor, nn

from common.resnet import Depth, imagenet_resnet


def head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The form that projector and predictor share."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


class BYOL(nn.Module):
    """Backbone f, projector g, predictor h: images `[B, 3, H, W]` to p = h(z) and z = g(f(x)).

    Args:
        architecture: of the backbone, torchvision's.
        hidden_dim: of both heads.
        projector_dim: d, of z and p.
    """

    def __init__(self, architecture: Depth, hidden_dim: int, projector_dim: int) -> None:
        super().__init__()
        self.backbone = imagenet_resnet(architecture)
        self.projector = head(self.backbone.feature_dim, hidden_dim, projector_dim)
        self.predictor = head(projector_dim, hidden_dim, projector_dim)

    def project(self, images: Tensor) -> Tensor:
        """z `[B, d]`, or ξ where the network is the target."""
        return self.projector(self.backbone(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.project(images)
        return self.predictor(z), z  # p, z: [B, d] each
