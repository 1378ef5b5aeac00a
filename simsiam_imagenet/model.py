"""SimSiam's network for ImageNet."""

from __future__ import annotations

import math

import torch
from torch import nn

from common.networks.head import head
from common.networks.resnet import Depth, imagenet_resnet
from common.networks.siamese import Siamese


class SimSiam(Siamese):
    """SimSiam over torchvision's ResNet.

    Args:
        architecture: of the backbone.
        projector_dim: d, the dimension of z and p.
        predictor_dim: the dimension of the predictor's hidden layer.
    """

    def __init__(self, architecture: Depth, projector_dim: int, predictor_dim: int) -> None:
        backbone = imagenet_resnet(architecture)
        d = projector_dim
        projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d),
            nn.BatchNorm1d(d),
        )
        super().__init__(backbone, projector, head(d, predictor_dim, d))
        self.apply(initialise)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """The authors' initialisation: uniform in ±1/√fan, where fan is the inputs of one unit."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        bound = 1 / math.sqrt(module.weight[0].numel())
        module.weight.uniform_(-bound, bound)
        if module.bias is not None:
            module.bias.uniform_(-bound, bound)
