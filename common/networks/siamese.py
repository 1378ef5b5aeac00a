"""The network of a Siamese method: backbone, projector and, for some methods, a predictor."""

from __future__ import annotations

from torch import Tensor, nn

from common.runtime.precision import wide


class Siamese(nn.Module):
    """Backbone f, projector g, predictor h: images `[B, 3, H, W]` to p = h(z) and z = g(f(x)).

    Args:
        backbone: images to features `[B, feature_dim]`.
        projector: features to z `[B, d]`.
        predictor: z to p `[B, d]`; None for a method without one, p is then z.
    """

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def project(self, images: Tensor) -> Tensor:
        """z `[B, d]`; of a target network this is the target ξ."""
        return self.projector(self.backbone(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.project(images)
        p = z if self.predictor is None else self.predictor(z)
        # Losses, and sums of their gradients, need the digits.
        return wide(p), wide(z)  # [B, d] each
