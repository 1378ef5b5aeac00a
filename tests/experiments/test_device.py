"""Whole runs on torch's meta device, whose tensors have a device but no values.

What works there mixes no tensors of the CPU with those of another device, and waits for that device
nowhere but in the few functions that are named here. No GPU is needed, and none is replaced: what
is particular to CUDA is not seen.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.evaluation import in_memory, pretrained, test_runner
from common.evaluation.photographs import PhotographEvaluation
from common.networks.resnet import imagenet_resnet
from common.runtime import launch
from common.training import training
from common.training.run_folder import RunLog

EXPERIMENTS = {
    "simclr_cifar10": {"hidden_dim": 16, "projector_dim": 8},
    "byol_cifar10": {"hidden_dim": 16, "projector_dim": 8},
    "simsiam_cifar10": {"projector_dim": 16, "predictor_dim": 8},
    "simsiam_imagenet": {"projector_dim": 16, "predictor_dim": 8},
    "byol_harder_aug_imagenet": {"hidden_dim": 16, "projector_dim": 8},
    "simclr_imagenet": {"hidden_dim": 16, "projector_dim": 8},
    "mocov2_imagenet": {"hidden_dim": 16, "projector_dim": 8, "norm_batch": 8, "queue_length": 64},
    "barlowtwins_imagenet": {"projector_dim": 16},
}
SMALL = {"dataset": "shapes", "device": "meta", "batch_size": 16, "max_steps": 2}
CIFAR = {"width": 8, "epochs": 2, "warmup_epochs": 0, "linear_epochs": 1}
IMAGENET = {"backbone": "resnet18", "image_size": 64, "workers": 0}


class OneDevice(TorchDispatchMode):
    """Refuses operations on CPU and meta tensors together, other than copies from one to another.

    On CUDA they fail too; torch lets a CPU tensor without dimensions pass there, as here.
    """

    def __torch_dispatch__(
        self, operation: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}
        if devices == {"cpu", "meta"} and "copy" not in operation.name():
            shapes = [(tensor.device.type, *tensor.shape) for tensor in tensors]
            raise AssertionError(f"{operation.name()} on {shapes}")
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The functions that ask for a meta tensor's values: they are told 0, or True."""
    found = set()

    def answer(name: str, value: Callable[[Tensor], object]) -> None:
        real = getattr(Tensor, name)

        def read(tensor: Tensor) -> object:
            if tensor.device.type != "meta":
                return real(tensor)
            found.add(sys._getframe(1).f_code.co_name)
            return value(tensor)

        monkeypatch.setattr(Tensor, name, read)

    answer("item", lambda tensor: 0.0)
    answer("tolist", lambda tensor: torch.zeros(tensor.shape).tolist())
    answer("__bool__", lambda tensor: True)
    # A user cannot choose this device.
    monkeypatch.setattr(launch, "_pick_device", lambda *arguments: torch.device("meta"))
    # Meta tensors know no autocast, and cannot be brought back to the CPU.
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(RunLog, "picture", lambda *arguments: None)
    monkeypatch.setattr(RunLog, "save_file", lambda *arguments, **options: None)
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_keeps_to_its_device(
    experiment: str, readers: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = importlib.import_module(f"{experiment}.run")
    monkeypatch.setattr(training, "picture_views", lambda *arguments: None)
    # Pictures are made of values.
    monkeypatch.setattr(in_memory, "show_neighbours", lambda *arguments: None)
    monkeypatch.setattr(in_memory, "checksum", lambda state: 0)
    monkeypatch.setattr(PhotographEvaluation, "neighbours", lambda evaluation: None)
    is_cifar = "cifar10" in experiment
    settings = {**SMALL, **(CIFAR if is_cifar else IMAGENET), **EXPERIMENTS[experiment]}
    with OneDevice():
        run.main(run.Config(**settings, run_dir=str(tmp_path)))
    # Once a step Meter._read; the others between epochs.
    evaluation = (
        {"accuracy_of_features", "linear_accuracy"} if is_cifar else {"accuracy_of_features"}
    )
    assert readers == {"_read", "require_finite", "agree", *evaluation}


@pytest.mark.parametrize("sweep", [(), (0.1, 0.2)])
def test_linear_evaluation_keeps_to_its_device(
    sweep: tuple[float, ...],
    readers: set[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    torch.save(imagenet_resnet("resnet18").state_dict(), tmp_path / "backbone.pt")
    # Both look at the weights' values, before and after everything else.
    monkeypatch.setattr(pretrained, "checksum", lambda state: 0)
    monkeypatch.setattr(torch, "equal", lambda one, other: True)
    config = test_runner.Config(
        str(tmp_path / "backbone.pt"),
        dataset="shapes",
        image_size=32,
        backbone="resnet18",
        workers=0,
        epochs=1,
        batch_size=1024,
        sweep=sweep,
        knn=True,
        device="meta",
    )
    with OneDevice():
        test_runner.main(config)
    assert readers == {"_read", "agree", "linear_result", "accuracy_of_features"}


def test_devices_that_mix_are_seen() -> None:
    on_meta, on_cpu = torch.empty(3, device="meta"), torch.ones(3)
    with OneDevice():
        on_meta.copy_(on_cpu)
        on_meta.mul_(torch.tensor(2.0))
        with pytest.raises(AssertionError, match="mul"):
            on_meta.mul_(on_cpu)
