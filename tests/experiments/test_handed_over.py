"""What each run.py hands to `common/` at settings of its own: views, losses, network, optimiser."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assertions import written
from common import dssl
from common.networks.batch_norm import BatchNorm
from common.training.run import Run
from common.training.training import Training
from common.views import ViewMaker, Views
from scripts import run_here

CIFAR = {
    "width": 8,
    "backbone": "resnet10",
    "epochs": 40,
    "warmup_epochs": 21,
    "knn_every": 0,
    "randaug_num_ops": 3,
    "randaug_magnitude": 7,
    "translate_relative": True,
}
IMAGENET = {
    "backbone": "resnet18",
    "image_size": 32,
    "workers": 0,
    "epochs": 40,
    "heavy_randaug": (3, 7),
}
OWN: dict[str, dict[str, Any]] = {
    "simsiam_cifar10": {"projector_dim": 16, "predictor_dim": 8},
    "simclr_cifar10": {"hidden_dim": 16, "projector_dim": 8, "temperature": 0.3},
    "byol_cifar10": {"hidden_dim": 16, "projector_dim": 8},
    "simsiam_imagenet": {"projector_dim": 16, "predictor_dim": 8},
    "byol_harder_aug_imagenet": {
        "hidden_dim": 16,
        "projector_dim": 8,
        "standard_randaug": (1, 5),
        "heavy_crop": False,
    },
    "simclr_imagenet": {
        "hidden_dim": 16,
        "projector_dim": 8,
        "temperature": 0.3,
        "warmup_epochs": 20,
    },
    "mocov2_imagenet": {"hidden_dim": 16, "projector_dim": 8, "norm_batch": 4, "queue_length": 20},
    "barlowtwins_imagenet": {
        "projector_dim": 16,
        "off_diagonal_weight": 0.3,
        "warmup_epochs": 20,
        "bias_lr_scale": 0.25,
    },
}
# Of the first epoch, whose rate is a twentieth of the peak where there is a warm-up.
RATES = {"simsiam_imagenet": 0.1, "byol_harder_aug_imagenet": 0.1, "mocov2_imagenet": 0.03}
MEAN_AND_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class TakenError(Exception):
    """Ends a run at its first loss."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a run hands over until `run_until_taken` ends it, by the parameters' names."""
    found: dict[str, Any] = {}

    def views(maker: ViewMaker, batch: Any) -> Views:
        found["maker"], found["key"] = maker, batch.key
        return really_make(maker, batch)

    def wrap(run: Run, network: nn.Module, **options: bool) -> nn.Module:
        found["wrap"] = options
        return really_wrap(run, network, **options)

    def set_lr(training: Training, lr: float) -> None:
        really_set(training, lr)
        found["lr"], found["groups"] = lr, training.parts["optimiser"].param_groups

    really_make, really_wrap, really_set = ViewMaker.views, Run.wrap, Training.set_lr
    monkeypatch.setattr(ViewMaker, "views", views)
    monkeypatch.setattr(Run, "wrap", wrap)
    monkeypatch.setattr(Training, "set_lr", set_lr)
    return found


def run_until_taken(
    experiment: str,
    settings: dict[str, Any],
    place: Path,
    taken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = importlib.import_module(f"{experiment}.run")
    signature = inspect.signature(dssl.loss_parts)

    def loss_parts(*arguments: Any, **options: Any) -> None:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        taken.update(bound.arguments)
        raise TakenError

    monkeypatch.setattr(script, "loss_parts", loss_parts)
    if hasattr(script, "RandomCrops"):

        class Crops(script.RandomCrops):
            def __init__(self, *arguments: Any) -> None:
                taken["crops"] = arguments[1:]
                super().__init__(*arguments)

        monkeypatch.setattr(script, "RandomCrops", Crops)
    with pytest.raises(TakenError):
        run_here(experiment, settings, place)


def losses_by_hand(experiment: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
    """L_A for a that moves to b, and L_S where it is one term, at the settings above."""
    unit_a, unit_b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    if experiment.startswith("simclr"):
        scores = unit_a @ unit_b.T / 0.3
        one_way = 0.5 * (scores.logsumexp(1) - scores.diag()).mean()
        z = torch.cat([unit_a, unit_b])
        scores = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
        positive = torch.cat([scores.diag(len(a)), scores.diag(-len(a))])
        return one_way, (scores.logsumexp(1) - positive).mean()
    if experiment.startswith("barlowtwins"):
        x, y = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b))
        c = x.T @ y / len(a)
        off_diagonal = c.square().sum() - c.diag().square().sum()
        whole = (1 - c.diag()).square().sum() + 0.3 * off_diagonal
        return 0.5 * whole, whole
    return -0.5 * (unit_a * unit_b).sum(1).mean(), None  # of two halves


@pytest.mark.parametrize("regime", ["baseline", "joint", "dssl"])
@pytest.mark.parametrize("experiment", OWN)
def test_what_a_run_hands_over(
    experiment: str,
    regime: str,
    folder: Path,
    tmp_path: Path,
    taken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = experiment.rpartition("_")[2]
    is_simsiam, is_moco = experiment.startswith("simsiam"), experiment.startswith("mocov2")
    settings = {"dataset": "folder", "data_root": str(folder), "device": "cpu", "batch_size": 8}
    settings |= {**(CIFAR if kind == "cifar10" else IMAGENET), **OWN[experiment]}
    settings |= {"regime": regime, "seed": 3}
    if is_simsiam and regime == "dssl":
        settings["reverse_weight"] = 0.3
    run_until_taken(experiment, settings, tmp_path, taken, monkeypatch)

    # The views; which augmentations these are is told in test_paper_settings.py.
    own = importlib.import_module(f"{experiment}.augmentation")
    flags: tuple[Any, ...] = (3, 7, True) if kind == "cifar10" else (3, 7)
    if experiment == "byol_harder_aug_imagenet":
        flags = (3, 7, 32, False)
    assert taken["maker"].regime == taken["regime"] == regime
    assert written(taken["maker"].standard) == written(own.standard_augmentation())
    assert written(taken["maker"].heavy) == written(own.heavy_augmentation(*flags))
    assert taken["key"] == (3, 1, 0)
    if kind == "imagenet":
        count, size, scale, seed, *whole = taken["crops"]
        assert (count, size, scale, seed) == (2, 32, own.CROP_SCALE, 3)
        expected = [(1, 5)] if experiment == "byol_harder_aug_imagenet" else []
        assert [(one.num_ops, one.magnitude) for one in whole] == expected

    # The losses; MoCo's are compared with a plain loop in test_moco.py.
    assert taken["one_sided"] == is_moco
    s = 0.3 if regime == "dssl" else 0.1 if kind == "cifar10" else 0.0
    assert taken["reverse_weight"] == (s if is_simsiam else 0.0)
    if not is_moco:
        a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
        asymmetric, symmetric = losses_by_hand(experiment, a, b)
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(taken["pair_loss"](a, b), asymmetric, **close)
        assert (taken["symmetric_loss"] is None) == (symmetric is None)
        if symmetric is not None:
            torch.testing.assert_close(taken["symmetric_loss"](a, b), symmetric, **close)

    # The network and its input.
    model, view = taken["model"], taken["views"].standard_1
    mean, std = (torch.tensor(values)[:, None, None] for values in MEAN_AND_STD[kind])
    p, z = taken["forward"](view)
    assert z.shape == (8, OWN[experiment]["projector_dim"])
    torch.testing.assert_close((p, z), model((view / 255 - mean) / std), rtol=1e-3, atol=1e-3)
    assert taken["wrap"] == ({"sync_batch_norm": False} if is_moco else {})

    # What is trained, and how fast.
    trained = [parameter for group in taken["groups"] for parameter in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))
    of_a_warmup = (0.03 if kind == "cifar10" else 0.3) * 8 / 256 / 20
    assert taken["lr"] == pytest.approx(RATES.get(experiment, of_a_warmup))
    scales = [1, 0.25] if experiment == "barlowtwins_imagenet" else [1]
    assert [group["lr"] / taken["lr"] for group in taken["groups"]] == pytest.approx(scales)


@pytest.mark.parametrize("synchronised", [True, False])
def test_on_cuda_batch_norm_is_synchronised_on_request(synchronised: bool) -> None:
    """Only the exchange of modules, which needs no GPU."""
    run = Run.__new__(Run)
    run.config, run.device = SimpleNamespace(compile=False), torch.device("cuda")
    run.ranks = SimpleNamespace(wrap=lambda network: network)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    run.wrap(network, sync_batch_norm=synchronised)
    assert isinstance(network[1], BatchNorm)
    assert network[1].synchronised is synchronised
