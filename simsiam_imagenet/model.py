"""SimSiam's network for ImageNet."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.networks.head import head
from common.networks.resnet import Depth, imagenet_resnet


class SimSiam(nn.Module):
    """Backbone f, projector g, predictor h: images `[B, 3, H, W]` to p = h(z) and z = g(f(x)).

    Args:
        architecture: of the backbone, torchvision's.
        projector_dim: d, of z and p.
        predictor_dim: of the predictor's bottleneck.
    """

    def __init__(self, architecture: Depth, projector_dim: int, predictor_dim: int) -> None:
        super().__init__()
        self.backbone = imagenet_resnet(architecture)
        d = projector_dim
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
        )
        self.predictor = head(d, predictor_dim, d)
        self.apply(initialise)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projector(self.backbone(images))
        p = self.predictor(z)
        return p, z  # [B, d] each


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """The authors' initialisation: uniform in ±1/√fan, fan being the inputs of a unit."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        bound = 1 / math.sqrt(module.weight[0].numel())
        module.weight.uniform_(-bound, bound)
        if module.bias is not None:
            module.bias.uniform_(-bound, bound)
