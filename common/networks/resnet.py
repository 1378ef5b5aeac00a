"""ResNet backbones without classifier: our own for 32-px images, torchvision's for larger ones."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.runtime.errors import UserError

Depth = Literal["resnet18", "resnet34", "resnet50"]
CifarDepth = Literal["resnet10", "resnet18", "resnet34", "resnet50"]  # resnet10: a block a stage

ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class CifarResNet(nn.Module):
    """For 32 px: a 3 × 3 stem, no max-pooling.

    Images `[B, 3, H, W]` to features `[B, feature_dim]` (512 for resnet18 at width 64).

    Parameters are named as in torchvision's ResNet and start from PyTorch's defaults, as in the
    authors' script.

    Args:
        architecture: "resnet10", "resnet18", "resnet34" or "resnet50".
        width: channels of the first stage, a multiple of 8; the stages have 1, 2, 4 and 8 times as
            many.
        stem_stride: 1 as in the paper's experiments, or 2, at a quarter of the cost.

    Raises:
        UserError: for another width or stride.
    """

    def __init__(
        self, architecture: CifarDepth = "resnet18", width: int = 64, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2):
            raise UserError(f"--stem-stride is 1 or 2, not {stem_stride}")
        if width < 8 or width % 8:
            # oneDNN 3.12's AVX2 convolutions crash or hang on 2 or 4 channels in channels_last.
            raise UserError(f"--width is a multiple of 8, not {width}")
        block, depths = ARCHITECTURES[architecture]
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels = width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and stage > 0 else 1
                downsample = None
                if stride != 1 or channels != planes * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                blocks.append(block(channels, planes, stride, downsample, base_width=64))
                channels = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = channels

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        return features.mean(dim=(2, 3))


def imagenet_resnet(architecture: Depth = "resnet50") -> ResNet:
    """torchvision's ResNet, its initialisation included: images to features `[B, feature_dim]`.

    Its state dict is torchvision's but for the classifier `fc`, which is missing.
    """
    network = models.get_model(architecture, weights=None)
    network.feature_dim = network.fc.in_features
    network.fc = nn.Identity()
    return network
