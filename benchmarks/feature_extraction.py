"""Features of CIFAR-10's images for kNN, ResNet-18: Resize 36, centre crop 32, normalise, forward.

python benchmarks/feature_extraction.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

import contestants
from common.cifar10 import MEAN, STD, centre_view, normalised
from common.distributed import Ranks
from common.features import extract_features
from common.memory import keep_freed_memory
from common.precision import autocast, has_native_bf16
from common.resnet import CifarResNet
from contest import Options, compare

COUNT = 1000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FeatureOptions(Options):
    rounds: int = 5
    threads: int = 2


def main(options: FeatureOptions) -> None:
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every run on a CPU does
    arrays = contestants.photographs(COUNT, 32, 32)
    images = contestants.to_batch(arrays)
    torch.manual_seed(0)
    contiguous = CifarResNet("resnet18", 64).eval()
    backbone = CifarResNet("resnet18", 64).eval().to(memory_format=torch.channels_last)
    transform = transforms.Compose(
        [
            transforms.Resize(36, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> Tensor:
            return transform(Image.fromarray(arrays[index]))

    loader = DataLoader(Pictures(), batch_size=256)

    @torch.no_grad()
    def by_loader() -> list[Tensor]:
        return [contiguous(batch) for batch in loader]

    def encode(part: Tensor) -> Tensor:
        with autocast("auto", CPU):
            return backbone(normalised(centre_view(part)))

    compare(
        f"features of {COUNT:,} CIFAR-10 images, ResNet-18",
        {
            "Pillow in a loader, fp32": by_loader,
            "this project, bf16" if has_native_bf16(CPU) else "this project (no bf16 here)": (
                lambda: extract_features(backbone, images, encode, Ranks(0, 1, CPU), lambda: None)
            ),
        },
        options,
        items=COUNT,
    )


if __name__ == "__main__":
    main(tyro.cli(FeatureOptions))
