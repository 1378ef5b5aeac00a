"""ResNet backbones without a classifier: for 32-px images, and torchvision's for larger ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.runtime.errors import UserError

Depth = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"
]  # torchvision's
CifarDepth = Literal["resnet10", "resnet18", "resnet34", "resnet50"]  # resnet10: 1 block per stage

ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}


class CifarResNet(ResNet):
    """ResNet for 32-px images: torchvision's, with a 3 × 3 stem and without max-pooling.

    It maps images `[B, 3, H, W]` to features `[B, feature_dim]` (512 for resnet18 at width 64).
    Parameters have torchvision's names. They are initialised by PyTorch's defaults, as in the
    authors' script, not by torchvision's rule for ResNets.

    Args:
        architecture: "resnet10", "resnet18", "resnet34" or "resnet50".
        width: channels of the first stage, a multiple of 8. The next stages have 2, 4 and 8 times
            as many.
        stem_stride: 1 as in the paper's experiments; 2 costs a quarter of the computation.

    Raises:
        UserError: for another width or stride.
    """

    def __init__(
        self, architecture: CifarDepth = "resnet18", width: int = 64, stem_stride: int = 1
    ) -> None:
        if stem_stride not in (1, 2):
            raise UserError(f"--stem-stride is 1 or 2, not {stem_stride}")
        if width < 8 or width % 8:
            # oneDNN 3.12's AVX2 convolutions crash or hang on 2 or 4 channels in channels_last.
            raise UserError(f"--width is a multiple of 8, not {width}")
        block, depths = ARCHITECTURES[architecture]
        with torch.device("meta"):  # no memory and no random draws: every layer is replaced
            super().__init__(block, depths)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.layer1 = self._make_layer(block, width, depths[0])
        self.layer2 = self._make_layer(block, 2 * width, depths[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, depths[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, depths[3], stride=2)
        self.fc = nn.Identity()
        self.feature_dim = self.inplanes


def imagenet_resnet(architecture: Depth = "resnet50") -> ResNet:
    """torchvision's ResNet, initialised by it: float `[B, 3, H, W]` to `[B, feature_dim]`.

    The state dict is that of torchvision's ResNet without the classifier `fc`.
    """
    network = models.get_model(architecture, weights=None)
    network.feature_dim = network.fc.in_features
    network.fc = nn.Identity()
    return network
