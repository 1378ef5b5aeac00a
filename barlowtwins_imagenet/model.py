"""Barlow Twins' network for ImageNet."""

from __future__ import annotations

from typing import Any

from torch import nn

from common.networks.resnet import Depth, imagenet_resnet
from common.networks.siamese import Siamese


class BarlowTwins(Siamese):
    """Barlow Twins over torchvision's ResNet: no predictor, so p is z.

    Args:
        architecture: of the backbone.
        projector_dim: d, the dimension of each of the projector's three layers, and of z.
    """

    def __init__(self, architecture: Depth, projector_dim: int) -> None:
        backbone = imagenet_resnet(architecture)
        d = projector_dim
        projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(inplace=True),
            nn.Linear(d, d, bias=False),
        )
        super().__init__(backbone, projector)


def parameter_groups(network: nn.Module, bias_lr_scale: float) -> list[dict[str, Any]]:
    """Parameters as `LARC` takes them: weights; biases and BatchNorm, as plain SGD without decay.

    Args:
        bias_lr_scale: rate of the second group, × that of the first.
    """
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    plain = {"adapts": False, "weight_decay": 0.0, "lr_scale": bias_lr_scale}
    return [{"params": weights}, {"params": others, **plain}]
