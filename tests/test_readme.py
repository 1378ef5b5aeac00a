"""What README.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from common.data.shapes import shapes
from common.networks.resnet import CifarResNet
from simsiam_cifar10.model import SimSiam

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LOAD, METHOD = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_two_lines_load_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = CifarResNet("resnet18", width=64)
    torch.save(trained.state_dict(), "backbone.pt")
    names = {"torch": torch, "CifarResNet": CifarResNet}
    exec(LOAD, names)
    assert LOAD.count("\n") == 2
    assert torch.equal(names["backbone"].conv1.weight, trained.conv1.weight)


def test_a_method_of_ones_own_trains() -> None:
    torch.manual_seed(0)
    model = SimSiam("resnet18", width=8, projector_dim=16, predictor_dim=8)
    before = [parameter.clone() for parameter in model.parameters()]
    images, _ = shapes(8, 32, seed=0)
    names = {
        "model": model,
        "optimiser": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [images],
    }
    exec(METHOD, names)
    after = list(model.parameters())
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_every_path_that_is_named_exists() -> None:
    for path in re.findall(r"`((?:common|\w+_cifar10|docs|results)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
    assert (ROOT / "docs" / "method.png").exists()
