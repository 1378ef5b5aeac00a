"""Features of CIFAR-10 images for kNN: Resize 36, centre crop 32, normalise, forward, ResNet-18.

python benchmarks/feature_extraction.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

import other_libraries
from common.augment.cifar10 import MEAN, STD, centre_view, normalised
from common.evaluation.features import extract_features
from common.networks.resnet import CifarResNet
from common.runtime.memory import keep_freed_memory
from common.runtime.precision import autocast, has_native_bf16
from common.runtime.ranks import Ranks
from contest import Options, apart, compare

COUNT = 1000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FeatureOptions(Options):
    rounds: int = 5
    threads: int = 2


class Pictures(torch.utils.data.Dataset):
    """The images as the authors' transform makes them, by Pillow."""

    def __init__(self) -> None:
        self.arrays = other_libraries.photographs(COUNT, 32, 32)
        self.transform = transforms.Compose(
            [
                transforms.Resize(36, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(32),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.arrays[index]))


def network() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet("resnet18", 64).eval()


def reference(options: FeatureOptions) -> Callable[[], list[Tensor]]:
    torch.set_num_threads(options.threads)
    backbone, loader = network(), DataLoader(Pictures(), batch_size=256)

    @torch.no_grad()
    def extract() -> list[Tensor]:
        return [backbone(batch) for batch in loader]

    return extract


def ours(options: FeatureOptions) -> Callable[[], Tensor]:
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every run on a CPU does
    backbone = network().to(memory_format=torch.channels_last)
    images = other_libraries.to_batch(other_libraries.photographs(COUNT, 32, 32))

    def encode(part: Tensor) -> Tensor:
        with autocast("auto", CPU):
            return backbone(normalised(centre_view(part)))

    return lambda: extract_features(backbone, images, encode, Ranks(0, 1, CPU), lambda: None)


def main(options: FeatureOptions) -> None:
    torch.set_num_threads(options.threads)
    name_of_ours = "this project, bf16" if has_native_bf16(CPU) else "this project (no bf16 here)"
    compare(
        f"features of {COUNT:,} CIFAR-10 images, ResNet-18",
        {
            "Pillow in a loader, fp32": apart(partial(reference, options), options),
            name_of_ours: apart(partial(ours, options), options),
        },
        options,
        items=COUNT,
    )


if __name__ == "__main__":
    main(tyro.cli(FeatureOptions))
