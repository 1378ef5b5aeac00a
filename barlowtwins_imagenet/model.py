"""Barlow Twins' network for ImageNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from common.networks.resnet import Depth, imagenet_resnet


class BarlowTwins(nn.Module):
    """Backbone f, projector g: images `[B, 3, H, W]` to z = g(f(x)), float `[B, d]`.

    Args:
        architecture: of the backbone, torchvision's.
        projector_dim: of the projector's three layers, d.
    """

    def __init__(self, architecture: Depth, projector_dim: int) -> None:
        super().__init__()
        self.backbone = imagenet_resnet(architecture)
        d = projector_dim
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


def parameter_groups(network: nn.Module, bias_lr_scale: float) -> list[dict[str, Any]]:
    """Parameters as `LARC` takes them: weights; biases and BatchNorm, as plain SGD without decay.

    Args:
        bias_lr_scale: rate of the second group, × that of the first.
    """
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    plain = {"adapts": False, "weight_decay": 0.0, "lr_scale": bias_lr_scale}
    return [{"params": weights}, {"params": others, **plain}]
