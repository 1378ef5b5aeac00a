"""Linear evaluation on photographs: what test_runner.py runs for every ImageNet experiment."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common import distributed
from common.checkpoint import Checkpoints, read_checkpoint
from common.distributed import Ranks
from common.errors import UserError, require
from common.image_ops import Draws, normalise
from common.larc import LARC
from common.linear_probe import new_classifier, train_classifier
from common.photo_ops import RandomFlip
from common.photographs import (
    CentreCrops,
    CropLoader,
    PhotographSet,
    RandomCrops,
    find_photographs,
    load,
    unpack,
)
from common.precision import Precision, autocast
from common.resnet import Depth, imagenet_resnet
from common.run_log import MAY_CHANGE, REPOSITORY
from common.schedule import cosine
from common.seeding import generator_for
from common.stop import StopFlag

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SCALE = (0.08, 1.0)  # area of a training crop, as a share of the photograph's
EVALUATION_BATCH = 256  # photographs at a time on each rank


@dataclass(frozen=True)
class Config:
    pretrained: str  # last.pt or backbone.pt of a run, or a ResNet's state dict as torchvision's
    # data
    dataset: Literal["folder", "shapes"] = "folder"  # photographs, or generated shapes for a try
    data_root: str = str(REPOSITORY / "data" / "imagenet")  # train/<class>/*, val/<class>/*
    image_size: int = 224  # pixels; evaluation resizes to 8/7 of it and cuts the centre
    workers: int = -1  # loader processes of each rank; -1: the machine's cores among its ranks
    skip_broken: bool = False  # in place of a training file that cannot be decoded take the next
    # model
    backbone: Depth = "resnet50"  # what was pretrained
    # optimisation: LARC over SGD, no weight decay
    epochs: int = 90  # of a cosine, no warm-up
    batch_size: int = 4096  # global, over all processes
    base_lr: float = 0.1  # for a batch of 256; scales with the batch
    momentum: float = 0.9  # of SGD
    # run
    seed: int = 0  # of the classifier, order and crops
    device: str = "auto"  # auto: every CUDA GPU, else MPS, else CPU
    precision: Precision = "auto"  # of the backbone: bf16 where the hardware has it, else fp32
    run_dir: str = ""  # for checkpoints and the result; default: the pretrained file's folder


def main(config: Config) -> None:
    # ---------------------------------------------------------------- setup
    require(config.seed >= 0, "--seed is 0 or more")
    require(config.epochs >= 1, "--epochs is 1 or more")
    distributed.use_every_gpu(config.device)
    ranks = distributed.start(config.device)
    device = ranks.device
    ranks.share(config.batch_size)
    backbone = load_backbone(Path(config.pretrained), config.backbone)
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}

    folder = Path(config.run_dir or Path(config.pretrained).parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "linear.jsonl").touch()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose --run-dir") from error

    # ---------------------------------------------------------------- data
    data = (config.dataset, config.data_root, config.image_size, config.seed)
    train = find_photographs(*data, config.batch_size, "train")
    test = find_photographs(*data, 1, "val")
    require(
        bool(train.class_names) and set(test.class_names) <= set(train.class_names),
        f"{config.data_root} needs train/<class>/* and val/<class>/* of the same classes",
    )
    labels = torch.tensor(train.labels)
    flip = RandomFlip()
    crops = RandomCrops(
        train.photographs, 1, config.image_size, CROP_SCALE, config.seed, config.skip_broken
    )
    loader = CropLoader(crops, config.batch_size, config.seed, config.workers, ranks)
    steps = -(-len(train.photographs) // config.batch_size)
    if len(train.photographs) % config.batch_size < ranks.world_size:
        steps = len(train.photographs) // config.batch_size  # a last batch too small to share

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with autocast(config.precision, device):
            return backbone(normalise(images, MEAN, STD)).float()

    def batches(epoch: int, first_step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, (images,), indices in loader.epoch(epoch, first_step, steps):
            generator = generator_for("linear", config.seed, epoch, step)
            count = len(indices) * ranks.world_size
            draws = flip.draw(count, (config.image_size,) * 2, generator)[ranks.share(count)]
            images = flip.apply(images, Draws.of(draws, device))
            yield step, encode(images), distributed.send(labels[indices], device)

    # ---------------------------------------------------------------- classifier
    classifier = new_classifier(backbone.feature_dim, len(train.class_names), config.seed)
    model = ranks.wrap(classifier)
    peak_lr = config.base_lr * config.batch_size / 256
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    stop = StopFlag(ranks)
    train_classifier(
        model,
        LARC(model.parameters(), lr=peak_lr, momentum=config.momentum),
        batches,
        lambda epoch: cosine(epoch, config.epochs, peak_lr),
        config.epochs,
        identity={**settings, "images": len(labels), "backbone": fingerprint(before)},
        checkpoints=Checkpoints(
            folder, "linear_last.pt", "linear_previous.pt", "remove these to train anew"
        ),
        ranks=ranks,
        stop=stop,
    )

    # ---------------------------------------------------------------- result
    top_1, top_5 = evaluate(test, train.class_names, encode, classifier, config, ranks, stop)
    for name, value in backbone.state_dict().items():
        if not torch.equal(value, before[name]):
            raise RuntimeError(f"the frozen backbone's {name} changed")
    if ranks.is_main:
        result = {"top_1": top_1, "top_5": top_5, "images": len(test.photographs)}
        with (folder / "linear.jsonl").open("a") as file:
            file.write(json.dumps({**result, "config": asdict(config)}) + "\n")
        print(f"linear accuracy  top-1 {top_1:.2f} %, top-5 {top_5:.2f} %")
        print(f"  of {len(test.photographs)} photographs; the backbone is unchanged, bit for bit")
        print(f"  written to {folder / 'linear.jsonl'}")
    distributed.finish()


def load_backbone(path: Path, architecture: Depth) -> nn.Module:
    """A ResNet with the weights of a run's checkpoint, its backbone.pt, or torchvision's format.

    Raises:
        UserError: if the file is missing, damaged or of another network.
    """
    state = read_checkpoint(path)
    if "model" in state:
        state = {
            name.removeprefix("backbone."): value
            for name, value in state["model"].items()
            if name.startswith("backbone.")
        }
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    backbone = imagenet_resnet(architecture)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"{path} does not fit a {architecture} ({reason}); name another with --backbone"
        ) from error
    return backbone


def fingerprint(state: Mapping[str, Tensor]) -> int:
    """A checksum of weights."""
    checksum = 0
    for value in state.values():
        checksum = zlib.crc32(value.cpu().contiguous().numpy().tobytes(), checksum)
    return checksum


@torch.no_grad()
def evaluate(
    test: PhotographSet,
    class_names: tuple[str, ...],
    encode: Callable[[Tensor], Tensor],
    classifier: nn.Module,
    config: Config,
    ranks: Ranks,
    stop: StopFlag,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent, each photograph counted once on any number of ranks.

    Raises:
        StopRequested: when a signal came.
        UserError: if a file cannot be decoded.
    """
    labels = torch.tensor([class_names.index(test.class_names[label]) for label in test.labels])
    mine = range(ranks.rank, len(labels), ranks.world_size)
    views = CentreCrops(test.photographs, config.image_size)
    loader = load(views, config.workers, ranks, sampler=mine, batch_size=EVALUATION_BATCH)
    counts = torch.zeros(3, device=ranks.device)  # right, right among five, seen
    for batch in loader:
        (images,), indices = unpack(batch)
        scores = classifier(encode(images.to(ranks.device, non_blocking=True)))
        best = scores.topk(min(5, len(class_names)), dim=1).indices
        right = best == labels[indices].to(ranks.device)[:, None]
        counts[:2] += torch.stack([right[:, 0].sum(), right.sum()])
        counts[2] += len(indices)
    stop.check()
    top_1, top_5, seen = ranks.sum(counts).tolist()
    assert seen == len(labels)
    return 100 * top_1 / seen, 100 * top_5 / seen
