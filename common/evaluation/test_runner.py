"""Linear evaluation on photographs: what test_runner.py runs for every ImageNet experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.augment.imagenet import normalised
from common.data.decoding import shown
from common.data.listing import renumber
from common.data.loader import Loading
from common.data.photographs import Dataset, find_photographs
from common.evaluation.accuracy import count_right, sweep_table
from common.evaluation.classifier import (
    Batches,
    Classifiers,
    new_classifier,
    saved_classifier,
    train_classifier,
)
from common.evaluation.feature_batches import cached_batches, centre_features, cropped_batches
from common.evaluation.knn import accuracy_of_features
from common.evaluation.pretrained import load_backbone, require_same_weights
from common.networks.resnet import Depth
from common.runtime import launch
from common.runtime.errors import UserError, require
from common.runtime.precision import Precision, autocast
from common.runtime.ranks import Ranks
from common.runtime.repository import REPOSITORY
from common.training.checkpoint import Checkpoints
from common.training.config_json import MAY_CHANGE, defaults_of
from common.training.larc import LARC
from common.training.lock import FolderLock
from common.training.metrics import append_once
from common.training.schedule import cosine
from common.training.settings import (
    BatchSize,
    Count,
    Fraction,
    Pixels,
    Rate,
    Seed,
    SweptRate,
    Workers,
    check_settings,
)
from common.training.signals import StopFlag


@dataclass(frozen=True)
class Config:
    pretrained: str  # last.pt or backbone.pt of a run, or a ResNet of another project
    # data
    dataset: Dataset = "folder"  # photographs, stl10 at --image-size 96, or generated shapes
    data_root: str = str(REPOSITORY / "data" / "imagenet")  # train/<class>/*, val/<class>/*; STL-10
    classes: str = ""  # a file of the classes to use, one a line; default: all
    image_size: Pixels = 224  # pixels; evaluation resizes to 8/7 of it and cuts the centre
    workers: Workers = -1  # loader processes of each rank; -1: its share of the usable cores
    skip_broken: bool = False  # in place of a training file that cannot be decoded take the next
    # model
    backbone: Depth = "resnet50"  # what was pretrained
    # optimisation: LARC over SGD, no weight decay
    epochs: Count = 90  # of a cosine, no warm-up
    batch_size: BatchSize = 4096  # global, over all processes
    base_lr: Rate = 0.1  # for a batch of 256; scales with the batch
    sweep: tuple[SweptRate, ...] = ()  # several base_lr at once, a table; implies --cache-features
    momentum: Fraction = 0.9  # of SGD
    cache_features: bool = False  # train on centre crops' features, extracted once into memory
    knn: bool = False  # weighted kNN too, on the features of centre crops; --epochs 0: only that
    # run
    seed: Seed = 0  # of the classifier, order, crops and shapes
    device: str = "auto"  # auto: every CUDA GPU, else MPS, else CPU
    precision: Precision = "auto"  # of the backbone: bf16 where the hardware has it, else fp32
    run_dir: str = ""  # for checkpoints and the result; default: the pretrained file's folder


def main(config: Config) -> None:
    # ---------------------------------------------------------------- setup
    check_settings(config)
    require(config.epochs >= 1 or config.knn, "--epochs is 1 or more, or 0 with --knn")
    require(config.epochs >= 1 or not config.sweep, "--sweep needs --epochs of 1 or more")
    require(len(set(config.sweep)) == len(config.sweep), "--sweep has the same rate twice")
    if config.sweep:
        config = replace(config, cache_features=True)
    launch.use_every_gpu(config.device)
    ranks = launch.start(config.device)
    device = ranks.device
    ranks.share(config.batch_size)
    source = Path(config.pretrained)
    backbone = load_backbone(
        source, config.backbone, image_size=config.image_size, tell=ranks.is_main
    )
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    weights = require_same_weights(backbone, source, ranks)

    folder = Path(config.run_dir or source.parent)
    # Files of its own for each kind of classifier: the others do not overwrite the protocol's.
    kind = "sweep" if config.sweep else "cached" if config.cache_features else "linear"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "linear.jsonl").touch()
        lock = FolderLock(folder, f".{kind}.lock") if config.epochs and ranks.is_main else None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose --run-dir") from error

    # ---------------------------------------------------------------- data
    data = (config.dataset, config.data_root, config.image_size, config.seed)
    train = find_photographs(*data, config.batch_size, "train", ranks, config.classes)
    test = find_photographs(*data, 1, "val", ranks, config.classes)
    for split, found in (("train", train), ("val", test)):
        require(
            not found.stray,
            f"{config.data_root} needs train/<class>/* and val/<class>/*, and {split}/"
            f"{shown(found.stray)} is in no class folder",
        )
    numbers = renumber(test.labels, test.class_names, train.class_names, "val/")
    test_labels = torch.tensor(numbers, device=device)
    train_labels = torch.tensor(train.labels, device=device)

    identity = identity_of(config, train.fingerprint, weights)
    checkpoints = Checkpoints(
        folder, f"{kind}_last.pt", f"{kind}_previous.pt", "remove these to train a new one"
    )
    if config.epochs:  # asked before hours of extracting features
        saved_classifier(checkpoints, identity, defaults_of(config), ranks, of_any_backbone=True)

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with autocast(config.precision, device):
            return backbone(normalised(images)).float()

    stop = StopFlag(ranks)
    reading = (encode, backbone.feature_dim, config.image_size)
    loading = Loading(config.workers)
    test_features, _ = centre_features(test.photographs, *reading, loading, ranks, stop)
    if config.cache_features or config.knn:
        loading = Loading(config.workers, skip_broken=config.skip_broken)
        train_features, used = centre_features(train.photographs, *reading, loading, ranks, stop)
        bank_labels = train_labels[used.to(device)]

    # ---------------------------------------------------------------- kNN
    result: dict[str, Any] = {"images": len(test_labels)}
    if config.knn:
        result["knn"] = accuracy_of_features(
            test_features, test_labels, train_features, bank_labels, len(train.class_names), ranks
        )

    # ---------------------------------------------------------------- classifier
    if config.cache_features:
        if ranks.is_main:
            print("Cached features: the classifier trains without the protocol's crops and flips.")
        whole = [ranks.gather(rows, len(train_labels)) for rows in (train_features, bank_labels)]
        batches = cached_batches(*whole, config, ranks)
    else:
        train_features = None  # its memory is free while the classifier trains
        batches = cropped_batches(train.photographs, train_labels, encode, config, ranks, stop)
    if config.epochs:
        classifier = new_classifier(backbone.feature_dim, len(train.class_names), config.seed)
        classifier = fit(classifier, batches, config, identity, checkpoints, ranks, stop)
        result |= linear_result(classifier, test_features, test_labels, config.sweep, ranks)
    if lock is not None:
        lock.release()

    # ---------------------------------------------------------------- result
    for name, value in backbone.state_dict().items():
        if not torch.equal(value, before[name]):
            raise RuntimeError(f"the frozen backbone's {name} changed")
    if ranks.is_main:
        # First on the screen: the disk may have filled up meanwhile.
        if config.sweep:
            print(sweep_table(result["sweep"]))
        elif config.epochs:
            print(f"linear accuracy  top-1 {result['top_1']:.2f} %, top-5 {result['top_5']:.2f} %")
        if config.knn:
            print(f"kNN accuracy     {result['knn']:.2f} %")
        print(f"  of {len(test_labels)} images; the backbone is unchanged, bit for bit")
        try:
            append_once(folder / "linear.jsonl", {**result, "config": asdict(config)})
        except OSError as error:
            raise UserError(
                f"{folder / 'linear.jsonl'} cannot be written ({error}); note the result above"
            ) from error
        print(f"  written to {folder / 'linear.jsonl'}")


def identity_of(config: Config, images: str, backbone: int) -> dict[str, Any]:
    """What a classifier depends on; only a checkpoint with the same identity is continued.

    Args:
        images: fingerprint of the training photographs.
        backbone: checksum of its weights.
    """
    # What else is measured does not touch training; the backbone is identified by its weights.
    unused = {"knn", "pretrained", *MAY_CHANGE} | ({"base_lr"} if config.sweep else set())
    settings = {name: value for name, value in asdict(config).items() if name not in unused}
    return {**settings, "images": images, "backbone": backbone}


def fit(
    start: nn.Linear,
    batches: Batches,
    config: Config,
    identity: Mapping[str, Any],
    checkpoints: Checkpoints,
    ranks: Ranks,
    stop: StopFlag,
) -> nn.Module:
    """Train the classifier under the protocol, or in a sweep a copy of it at each learning rate.

    Args:
        start: its weights at the start.
        identity: by `identity_of`.

    Returns:
        `start`, trained; in a sweep `Classifiers`.

    Raises:
        StopRequested: after a checkpoint, when a signal came.
        UserError: if the loss is not finite, in a sweep every loss.
    """
    classifier, remedy = start, "try a lower --base-lr"
    if config.sweep:
        classifier, remedy = Classifiers(start, len(config.sweep)), "try lower rates in --sweep"

    def rate(epoch: int) -> float | Tensor:
        base_lrs = config.sweep or (config.base_lr,)
        peaks = [base_lr * config.batch_size / 256 for base_lr in base_lrs]
        rates = [cosine(epoch, config.epochs, peak) for peak in peaks]
        return torch.tensor(rates, device=ranks.device) if config.sweep else rates[0]

    model = ranks.wrap(classifier)
    train_classifier(
        model,
        LARC(model.parameters(), lr=0.0, momentum=config.momentum),  # `rate` sets each epoch's
        batches,
        rate,
        config.epochs,
        identity=identity,
        defaults=defaults_of(config),
        checkpoints=checkpoints,
        ranks=ranks,
        stop=stop,
        remedy=remedy,
    )
    return classifier


def linear_result(
    classifier: nn.Module, features: Tensor, labels: Tensor, sweep: tuple[float, ...], ranks: Ranks
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in percent, in a sweep those of each base learning rate.

    Args:
        classifier: one, or in a sweep `Classifiers`.
        features: of this rank's share of the images, every world_size-th.
        labels: int64, of all images.
        sweep: the base learning rates; empty: no sweep.
    """
    own_labels = labels[ranks.rank :: ranks.world_size]
    right = ranks.sum(count_right(classifier, features, own_labels)).tolist()
    accuracies = [
        {"top_1": 100 * top_1 / len(labels), "top_5": 100 * top_5 / len(labels)}
        for top_1, top_5 in right
    ]
    if not sweep:
        return accuracies[0]
    rows = zip(sweep, classifier.diverged().tolist(), accuracies, strict=True)
    return {
        "sweep": [
            {"base_lr": base_lr, **({"diverged": True} if lost else accuracy)}
            for base_lr, lost, accuracy in rows
        ]
    }
