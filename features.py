"""Write the features of images to a file for NumPy.

    python features.py --pretrained runs/simsiam_imagenet/dssl-seed0/last.pt --data-root DIR \\
        --output features.npz

The weights are a last.pt or backbone.pt of any run here, or a ResNet that torchvision or another
project has written (common/networks/weights.py). DIR holds images in any folders; where it has a
train/, `--split` chooses between train/ and val/. On every GPU of the machine, or under torchrun.

The file holds `features`, float32 [N, d]; `paths`, the names of the images below DIR, DIR/train or
DIR/val; and where they are in class folders `labels`, int64 [N], indices into `class_names`:

    file = numpy.load("features.npz")
    features, paths = file["features"], file["paths"]

The images are those of evaluation: the shorter side is resized to 8/7 of `--image-size` and the
centre is cut out. A backbone for 32-px images takes them as kNN of the CIFAR-10 experiments does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.augment import cifar10, imagenet
from common.data.in_memory import CIFAR, load_images
from common.data.listing import first_of
from common.data.loader import Loading
from common.data.photographs import CentreCrops, PhotographSet, Squares, find_photographs
from common.evaluation.feature_batches import feature_batches, joined_features
from common.evaluation.pretrained import load_backbone, require_same_weights
from common.networks.resnet import CifarResNet
from common.runtime import launch
from common.runtime.errors import UserError, require
from common.runtime.files import whole_file
from common.runtime.output import say
from common.runtime.precision import Precision, autocast
from common.runtime.ranks import Ranks
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script
from common.training.metrics import first_free
from common.training.settings import Pixels, Seed, Workers, check_settings
from common.training.signals import StopFlag


@dataclass(frozen=True)
class Config:
    pretrained: str  # last.pt or backbone.pt of a run, or a ResNet of another project
    output: str  # the .npz file to write; a file that exists is not overwritten
    # data
    dataset: Literal["folder", "stl10", "cifar10", "cifar100", "shapes"] = "folder"  # of data_root
    data_root: str = str(REPOSITORY / "data" / "imagenet")  # images in any folders
    split: Literal["train", "val"] = "train"  # without a folder train/, train is all images
    image_size: Pixels = 224  # pixels; a backbone for 32-px images takes 32
    workers: Workers = -1  # loader processes of each rank; -1: its share of the usable cores
    skip_broken: bool = False  # leave out files that cannot be decoded
    # model
    stem_stride: Literal[0, 1, 2] = 0  # of a backbone for 32 px; 0: as in its config.json, else 1
    # run
    seed: Seed = 0  # of shapes
    device: str = "auto"  # auto: every CUDA GPU, else MPS, else CPU
    precision: Precision = "auto"  # of the backbone: bf16 where the hardware has it, else fp32


def main(config: Config) -> None:
    check_settings(config)
    launch.use_every_gpu(config.device)
    ranks = launch.start(config.device)
    output = Path(config.output)
    require_free(output)

    backbone = load_backbone(
        Path(config.pretrained),
        stem_stride=config.stem_stride or None,
        image_size=config.image_size,
        tell=ranks.is_main,
    )
    require_same_weights(backbone, Path(config.pretrained), ranks)
    backbone = backbone.to(ranks.device, memory_format=torch.channels_last).eval()
    is_small = isinstance(backbone, CifarResNet)
    require(is_small or not config.stem_stride, "--stem-stride is only for backbones of 32 px")
    size = cifar10.IMAGE_SIZE if is_small else config.image_size
    require(
        config.image_size in (size, Config.image_size),
        f"{config.pretrained} takes images of {size} px: leave out --image-size",
    )
    found = find_images(config, size, ranks)
    require_room(output.parent, len(found.photographs) * backbone.feature_dim * 4)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with autocast(config.precision, ranks.device):
            if is_small:
                return backbone(cifar10.normalised(cifar10.centre_view(images))).float()
            return backbone(imagenet.normalised(images)).float()

    views = (Squares if is_small else CentreCrops)(found.photographs, size)
    loading = Loading(config.workers, skip_broken=config.skip_broken)
    dim = backbone.feature_dim
    batches = feature_batches(views, encode, dim, loading, ranks, StopFlag(ranks))
    features, done = joined_features(batches, len(views), dim, ranks)
    if ranks.is_main:
        write(output, features, done.tolist(), found)


def find_images(config: Config, size: int, ranks: Ranks) -> PhotographSet:
    """The images of a split; without file names they are numbered."""
    source = (config.dataset, config.data_root)
    if config.dataset in CIFAR:
        train, test = load_images(*source, cifar10.IMAGE_SIZE, config.seed, False, 1, ranks)
        images = train if config.split == "train" else test
        labels = images.labels.tolist()
        found = PhotographSet(list(images.images), labels, images.class_names, images.fingerprint)
    else:
        found = find_photographs(*source, size, config.seed, 1, config.split, ranks)
    numbered = [f"{config.split} {index}" for index in range(len(found.photographs))]
    return found._replace(names=found.names or numbered)


def require_free(output: Path) -> None:
    """Refuse a name that cannot be written or is taken.

    Raises:
        UserError: naming the file.
    """
    require(output.suffix == ".npz", f"--output {output}: the name has to end with .npz")
    try:
        require(not output.exists(), f"{output} exists already; choose another --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error}); choose another --output") from error


def require_room(folder: Path, size: int) -> None:
    """Raise a `UserError` if the folder has no room for a file of `size` bytes."""
    free = shutil.disk_usage(folder).free
    require(
        size < free,
        f"the features take {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; make "
        "room, or choose another --output",
    )


def write(output: Path, features: Tensor, done: Sequence[int], found: PhotographSet) -> None:
    """Write features float32 `[n, d]` of the photographs `done`, n of those that were found.

    If the name is taken by now, `output.1` is written; if nothing can be written there, a file in
    the system's folder for temporary files.

    Raises:
        UserError: if neither can be written.
    """
    content = {"features": features.numpy(), "paths": np.array([found.names[i] for i in done])}
    if found.class_names:
        content["labels"] = np.array(found.labels, np.int64)[done]
        content["class_names"] = np.array(found.class_names)
    broken = sorted(set(range(len(found.names))).difference(done))
    if broken:
        say(f"Left out {len(broken)} broken files: {first_of([found.names[i] for i in broken])}")
    # After hours of work another file may have taken the name, or the room. A quota shows only now.
    place = output
    try:
        place = first_free(output) if output.exists() else output
        save(place, content)
    except OSError as error:
        problem = f"{place} cannot be written ({error})"
        try:
            place = first_free(Path(tempfile.gettempdir()) / output.name)
            save(place, content)
        except OSError as further:
            raise UserError(
                f"{problem}, nor can {place} ({further}); choose another --output"
            ) from further
        say(f"warning: {problem}; the features are in {place}")
    say(f"Written: {len(done)} features of {features.shape[1]} numbers, {place}")


def save(place: Path, content: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an .npz file of any name."""
    with whole_file(place) as file:
        np.savez(file, **content)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
