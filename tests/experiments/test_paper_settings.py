"""What an experiment uses without a flag: settings and augmentations, written out again.

The authors' scripts and, where there is none, this project's choices: docs/differences.md.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from assertions import written
from common.augment import cifar10, imagenet
from common.evaluation import in_memory, test_runner
from common.evaluation.in_memory import LinearProtocol

CIFAR = {
    "regime": "dssl",
    "randaug_num_ops": 2,
    "randaug_magnitude": 9,
    "translate_relative": False,
    "backbone": "resnet18",
    "width": 64,
    "stem_stride": 1,
    "epochs": 800,
    "warmup_epochs": 10,
    "batch_size": 512,
    "base_lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "linear_epochs": 100,
}
PHOTOGRAPHS = {
    "regime": "dssl",
    "backbone": "resnet50",
    "image_size": 224,
    "epochs": 100,
    "batch_size": 512,
    "momentum": 0.9,
}
SGD = {"lr": 0.1, "weight_decay": 1e-4}
LARC = {"base_lr": 0.3, "weight_decay": 1e-6, "warmup_epochs": 10}
SETTINGS = {
    "simsiam_cifar10": {
        **CIFAR,
        "projector_dim": 2048,
        "predictor_dim": 512,
        "reverse_weight": 0.1,
    },
    "simclr_cifar10": {**CIFAR, "hidden_dim": 2048, "projector_dim": 128, "temperature": 0.5},
    "byol_cifar10": {**CIFAR, "hidden_dim": 4096, "projector_dim": 256, "ema_decay": 0.99},
    "simsiam_imagenet": {
        **PHOTOGRAPHS,
        **SGD,
        "projector_dim": 2048,
        "predictor_dim": 512,
        "reverse_weight": 0.0,
        "heavy_randaug": (2, 9),
    },
    "byol_harder_aug_imagenet": {
        **PHOTOGRAPHS,
        **SGD,
        "hidden_dim": 4096,
        "projector_dim": 256,
        "ema_decay": 0.99,
        "standard_randaug": (2, 9),
        "heavy_randaug": (8, 16),
        "heavy_crop": True,
    },
    "simclr_imagenet": {
        **PHOTOGRAPHS,
        **LARC,
        "hidden_dim": 2048,
        "projector_dim": 128,
        "temperature": 0.1,
        "heavy_randaug": (2, 9),
    },
    "mocov2_imagenet": {
        **PHOTOGRAPHS,
        **SGD,
        "batch_size": 256,
        "lr": 0.03,
        "hidden_dim": 2048,
        "projector_dim": 128,
        "norm_batch": 32,
        "ema_decay": 0.999,
        "queue_length": 65_536,
        "temperature": 0.2,
        "heavy_randaug": (2, 9),
    },
    "barlowtwins_imagenet": {
        **PHOTOGRAPHS,
        **LARC,
        "projector_dim": 8192,
        "bias_lr_scale": 0.016,
        "off_diagonal_weight": 0.0051,
        "heavy_randaug": (2, 9),
    },
}


@pytest.mark.parametrize("experiment", SETTINGS)
def test_defaults(experiment: str) -> None:
    script = importlib.import_module(f"{experiment}.run")
    config = script.Config()
    assert {name: getattr(config, name) for name in SETTINGS[experiment]} == SETTINGS[experiment]
    statistics = cifar10 if experiment.endswith("cifar10") else imagenet
    assert script.normalised is statistics.normalised


@pytest.mark.parametrize("experiment", SETTINGS)
def test_every_setting_is_explained(experiment: str) -> None:
    """By a comment in its line, which `--help` shows."""
    config = importlib.import_module(f"{experiment}.run").Config
    source = inspect.getsource(config)
    unexplained = [
        one.name
        for one in fields(config)
        if not re.search(rf"^    {one.name}: [^#\n]*  # \w", source, re.MULTILINE)
    ]
    assert unexplained == []


def test_linear_evaluation_on_photographs() -> None:
    config = test_runner.Config("")
    used = (config.epochs, config.batch_size, config.base_lr, config.momentum)
    assert used == (90, 4096, 0.1, 0.9)


def test_linear_evaluation_on_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    class TakenError(Exception):
        pass

    taken: list[Any] = []

    def take(*arguments: object, **options: object) -> float:
        taken.extend(arguments)
        raise TakenError

    monkeypatch.setattr(in_memory, "linear_accuracy", take)
    evaluation = in_memory.Evaluation.__new__(in_memory.Evaluation)
    evaluation.train, evaluation.test = object(), object()
    evaluation.network = SimpleNamespace(backbone=nn.Linear(1, 1))
    evaluation.training = SimpleNamespace(
        progress=SimpleNamespace(steps=lambda _: 7),
        steps_per_epoch=1,
        config=SimpleNamespace(seed=0),
        log=SimpleNamespace(folder=Path()),
        ranks=None,
        stop=None,
    )
    with pytest.raises(TakenError):
        evaluation.linear(100)
    assert taken[1:3] == [evaluation.train, evaluation.test]
    augmentation, encode_train, encode_test, protocol = taken[3:]
    assert written(augmentation) == crop(32, (0.8, 1.0), "bicubic")
    assert encode_train == evaluation.encode
    assert encode_test == evaluation.encode_test
    assert protocol == LinearProtocol(100, 256, 30.0, (0.6, 0.8), 0.9)


# ---------------------------------------------------------------- augmentations


def jitter(strength: float, hue: float) -> tuple[str, dict[str, object]]:
    low, high = [1 - strength] * 3 + [-hue], [1 + strength] * 3 + [hue]
    return "ColorJitter", {
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "probability": 0.8,
    }


def randaug(num_ops: int, magnitude: int) -> tuple[str, dict[str, object]]:
    values = {"num_ops": num_ops, "magnitude": magnitude, "translate_relative": False}
    return "RandAugment", values


def crop(
    size: int, scale: tuple[float, float], kernel: str = "bilinear"
) -> tuple[str, dict[str, object]]:
    return "RandomResizedCropFlip", {"size": size, "scale": scale, "kernel": kernel}


FLIP, GREY = ("RandomFlip", {"probability": 0.5}), ("RandomGrey", {"probability": 0.2})
BLUR = ("GaussianBlur", {"sigma": (0.1, 2.0), "probability": 0.5})
SHUFFLE = ("GridShuffle", {"grid": 4})


@pytest.mark.parametrize("experiment", ["simsiam", "simclr", "byol"])
def test_views_of_cifar10(experiment: str) -> None:
    own = importlib.import_module(f"{experiment}_cifar10.augmentation")
    standard = [crop(32, (0.2, 1.0)), jitter(0.4, 0.1), GREY]
    assert written(own.standard_augmentation()) == standard
    assert written(own.heavy_augmentation(2, 9, False)) == randaug(2, 9)


@pytest.mark.parametrize("experiment", ["simsiam", "simclr", "mocov2", "barlowtwins"])
def test_views_of_photographs(experiment: str) -> None:
    own = importlib.import_module(f"{experiment}_imagenet.augmentation")
    scale, colours = ((0.2, 1.0), (0.4, 0.1))
    if experiment == "simclr":
        scale, colours = ((0.08, 1.0), (0.8, 0.2))
    assert scale == own.CROP_SCALE
    assert written(own.standard_augmentation()) == [FLIP, jitter(*colours), GREY, BLUR]
    assert written(own.heavy_augmentation(2, 9)) == (0.9, randaug(2, 9), SHUFFLE)


def test_harder_views_of_photographs() -> None:
    own = importlib.import_module("byol_harder_aug_imagenet.augmentation")
    script = importlib.import_module("byol_harder_aug_imagenet.run")
    assert script.CROP_SCALE == (0.2, 1.0)
    assert written(script.standard_augmentation()) == [FLIP, jitter(0.4, 0.1), GREY, BLUR]
    assert written(own.whole_augmentation(2, 9)) == randaug(2, 9)
    assert own.whole_augmentation(0, 0) is None
    second = [crop(224, (0.2, 1.0)), jitter(0.5, 0.1), GREY, BLUR]
    heavy = [randaug(8, 16), *second, (0.1, SHUFFLE)]
    assert written(own.heavy_augmentation(8, 16, 224, True)) == heavy
    assert written(own.heavy_augmentation(2, 9, 224, False)) == randaug(2, 9)
