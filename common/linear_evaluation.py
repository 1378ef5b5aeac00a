"""Linear evaluation on photographs: what test_runner.py runs for every ImageNet experiment."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.checkpoint import Checkpoints, read_checkpoint
from common.distributed import Ranks
from common.errors import StopRequested, UserError, require
from common.image_ops import Draws, normalise
from common.knn import knn_predict
from common.larc import LARC
from common.linear_probe import Batches, new_classifier, train_classifier
from common.photo_ops import RandomFlip
from common.photographs import (
    CentreCrops,
    CropLoader,
    EpochBatches,
    Loading,
    Photograph,
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
    cache_features: bool = False  # centre crops' features once, in memory: seconds, but no crops
    knn: bool = False  # weighted kNN too, on the features of centre crops; --epochs 0: only that
    # run
    seed: int = 0  # of the classifier, order and crops
    device: str = "auto"  # auto: every CUDA GPU, else MPS, else CPU
    precision: Precision = "auto"  # of the backbone: bf16 where the hardware has it, else fp32
    run_dir: str = ""  # for checkpoints and the result; default: the pretrained file's folder


def main(config: Config) -> None:
    # ---------------------------------------------------------------- setup
    require(config.seed >= 0, "--seed is 0 or more")
    require(config.epochs >= 1 or config.knn, "--epochs is 1 or more, or 0 with --knn")
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

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with autocast(config.precision, device):
            return backbone(normalise(images, MEAN, STD)).float()

    stop = StopFlag(ranks)
    train_labels = torch.tensor(train.labels, device=device)
    numbers = [train.class_names.index(test.class_names[label]) for label in test.labels]
    test_labels = torch.tensor(numbers, device=device)

    def features_of(photographs: Sequence[Photograph]) -> Tensor:
        """Of the centre crops of this rank's photographs: rank, rank + world_size, …"""
        mine = range(ranks.rank, len(photographs), ranks.world_size)
        views = CentreCrops(photographs, config.image_size)
        loader = load(
            views, Loading(config.workers), ranks, sampler=mine, batch_size=EVALUATION_BATCH
        )
        features = [torch.empty(0, backbone.feature_dim, device=device)]
        for batch in tqdm(loader, "features", disable=not ranks.is_main):
            (images,), _ = unpack(batch)
            features.append(encode(images.to(device, non_blocking=True)))
            if stop.requested:
                raise StopRequested(stop.exit_status)
        return torch.cat(features)

    test_features = features_of(test.photographs)
    train_features = None
    if config.cache_features or config.knn:
        train_features = features_of(train.photographs)

    # ---------------------------------------------------------------- classifier
    classifier = new_classifier(backbone.feature_dim, len(train.class_names), config.seed)
    model = ranks.wrap(classifier)
    peak_lr = config.base_lr * config.batch_size / 256
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    if config.cache_features:
        if ranks.is_main:
            print("Cached features: the classifier trains without the protocol's crops and flips.")
        whole = ranks.gather(train_features, len(train_labels))
        batches = cached_batches(whole, train_labels, config, ranks)
    else:
        batches = cropped_batches(train.photographs, train_labels, encode, config, ranks)
    train_classifier(
        model,
        LARC(model.parameters(), lr=peak_lr, momentum=config.momentum),
        batches,
        lambda epoch: cosine(epoch, config.epochs, peak_lr),
        config.epochs,
        identity={**settings, "images": len(train_labels), "backbone": fingerprint(before)},
        checkpoints=Checkpoints(
            folder, "linear_last.pt", "linear_previous.pt", "remove these to train anew"
        ),
        ranks=ranks,
        stop=stop,
        way_out="try a lower --base-lr",
    )

    # ---------------------------------------------------------------- result
    result = {"images": len(test_labels)}
    if config.epochs:
        with torch.no_grad():
            scores = ranks.gather(classifier(test_features), len(test_labels))
        best = scores.topk(min(5, len(train.class_names)), dim=1).indices
        right = best == test_labels[:, None]
        result["top_1"] = 100 * right[:, 0].sum().item() / len(test_labels)
        result["top_5"] = 100 * right.sum().item() / len(test_labels)
    if config.knn:
        queries = ranks.gather(test_features, len(test_labels))
        bank_labels = train_labels[ranks.rank :: ranks.world_size]
        predictions = knn_predict(
            queries, train_features, bank_labels, len(train.class_names), ranks=ranks
        )
        result["knn"] = 100 * (predictions == test_labels).sum().item() / len(test_labels)
    for name, value in backbone.state_dict().items():
        if not torch.equal(value, before[name]):
            raise RuntimeError(f"the frozen backbone's {name} changed")
    if ranks.is_main:
        with (folder / "linear.jsonl").open("a") as file:
            file.write(json.dumps({**result, "config": asdict(config)}) + "\n")
        if config.epochs:
            print(f"linear accuracy  top-1 {result['top_1']:.2f} %, top-5 {result['top_5']:.2f} %")
        if config.knn:
            print(f"kNN accuracy     {result['knn']:.2f} %")
        print(f"  of {len(test_labels)} photographs; the backbone is unchanged, bit for bit")
        print(f"  written to {folder / 'linear.jsonl'}")
    distributed.finish()


def cropped_batches(
    photographs: Sequence[Photograph],
    labels: Tensor,
    encode: Callable[[Tensor], Tensor],
    config: Config,
    ranks: Ranks,
) -> Batches:
    """The protocol's training views: a random crop and a flip of each photograph."""
    crops = RandomCrops(
        photographs, 1, config.image_size, CROP_SCALE, config.seed, config.skip_broken
    )
    loader = CropLoader(crops, config.batch_size, config.seed, Loading(config.workers), ranks)
    steps = steps_of(len(photographs), config, ranks)
    flip, size = RandomFlip(), (config.image_size, config.image_size)

    def batches(epoch: int, first_step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, (images,), indices in loader.epoch(epoch, first_step, steps):
            count = len(indices) * ranks.world_size
            generator = generator_for("linear", config.seed, epoch, step)
            draws = flip.draw(count, size, generator)[ranks.share(count)]
            images = flip.apply(images, Draws.of(draws, images.device))
            yield step, encode(images), labels[distributed.send(indices, labels.device)]

    return batches


def cached_batches(features: Tensor, labels: Tensor, config: Config, ranks: Ranks) -> Batches:
    """Batches of ready features `[N, d]`, in the same order as `cropped_batches`'."""
    keys = EpochBatches(len(features), config.batch_size, config.seed, ranks)
    steps = steps_of(len(features), config, ranks)

    def batches(epoch: int, first_step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        keys.epoch, keys.steps = epoch, range(first_step, steps)
        for step, batch in zip(keys.steps, keys, strict=True):
            index = torch.tensor([index for _, index in batch])
            index = distributed.send(index, features.device)
            yield step, features[index], labels[index]

    return batches


def steps_of(count: int, config: Config, ranks: Ranks) -> int:
    """Steps of an epoch: with a last, smaller batch, unless the ranks cannot share it."""
    whole, rest = divmod(count, config.batch_size)
    return whole + (rest >= ranks.world_size)


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
