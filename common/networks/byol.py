"""BYOL's online network over any backbone; the target network is a copy (`ema.py`)."""

from __future__ import annotations

from torch import Tensor, nn

from common.networks.head import head


class BYOL(nn.Module):
    """Backbone f, projector g, predictor h: images `[B, 3, H, W]` to p = h(z) and z = g(f(x)).

    Args:
        backbone: images to features `[B, feature_dim]`, the attribute of that name.
        hidden_dim: of both heads.
        projector_dim: d, of z and p.
    """

    def __init__(self, backbone: nn.Module, hidden_dim: int, projector_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = head(backbone.feature_dim, hidden_dim, projector_dim)
        self.predictor = head(projector_dim, hidden_dim, projector_dim)

    def project(self, images: Tensor) -> Tensor:
        """z `[B, d]`, or ξ where the network is the target."""
        return self.projector(self.backbone(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.project(images)
        return self.predictor(z), z  # p, z: [B, d] each
