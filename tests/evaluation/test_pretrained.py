"""Backbones out of files: of runs, of other programs, and with code in them."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from common.evaluation.pretrained import load_backbone
from common.networks.resnet import CifarResNet, imagenet_resnet
from common.runtime.errors import UserError
from simsiam_imagenet.model import SimSiam


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return imagenet_resnet("resnet18").state_dict()


class Hyperparameters(dict):
    """As Lightning saves them: a dictionary of a class of its own, here with attributes too."""


def test_settings_of_any_class_beside_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Hyperparameters(lr=0.1, shape=torch.Size([3]), kind=Path)
    settings.name = "byol"
    expected = weights()
    content = {
        "teacher": {f"module.backbone.{name}": value for name, value in expected.items()},
        "student": {f"module.backbone.{name}": value for name, value in weights(1).items()},
        "args": argparse.Namespace(lr=0.1, output_dir=Path("runs")),  # as DINO
        "hyper_parameters": settings,
        "callbacks": {Path: {"best": numpy.float64(81.5), "curve": numpy.arange(3.0)}},
    }
    torch.save(content, tmp_path / "weights.ckpt")
    found = load_backbone(tmp_path / "weights.ckpt", "resnet18").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert capsys.readouterr().out.splitlines() == [
        "Backbone: resnet18, the weights behind 'teacher.module.backbone.' in "
        f"{tmp_path / 'weights.ckpt'}.",
        "  Other whole ResNets in it, not used: student.module.backbone.",
        "  Not used: student",
    ]


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('pathlib').Path({str(self.path)!r}).touch()",)


def test_code_beside_weights_is_not_run(tmp_path: Path) -> None:
    proof, file = tmp_path / "it ran", tmp_path / "weights.ckpt"
    torch.save({"state_dict": weights(), "callback": Harmful(proof)}, file)
    torch.load(file, weights_only=False)
    assert proof.exists(), "it would run"
    proof.unlink()
    assert torch.equal(load_backbone(file).conv1.weight, weights()["conv1.weight"])
    assert not proof.exists()
    # No stand-in takes the state of a partial function.
    torch.save({"state_dict": weights(), "callback": partial(print, 1)}, file)
    with pytest.raises(UserError, match=r"plain values, functools\.partial, .* state dict alone"):
        load_backbone(file)
    # Torch names no classes of a file in its old format: it is refused.
    torch.save(
        {"state_dict": weights(), "callback": Harmful(proof)},
        file,
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(UserError, match=r"more than tensors .* save the state dict alone"):
        load_backbone(file)
    assert not proof.exists()


def test_a_run_s_files_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    whole, target = (SimSiam("resnet18", projector_dim=8, predictor_dim=4) for _ in range(2))
    expected = whole.backbone.state_dict()
    states = {
        "model": whole.state_dict(),
        "target": target.state_dict(),
        "config": {"lr": 1, "image_size": 96},
    }
    torch.save(states, tmp_path / "last.pt")
    torch.save(expected, tmp_path / "backbone.pt")
    for name in ("last.pt", "backbone.pt"):
        found = load_backbone(tmp_path / name, "resnet18").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for size in (96, 224):
        capsys.readouterr()
        load_backbone(tmp_path / "last.pt", image_size=size)
        said = capsys.readouterr().out
        assert ("Trained on views of 96 px, evaluated at 224 (--image-size)" in said) == (
            size != 96
        )


@pytest.mark.parametrize("architecture", ["resnet10", "resnet18", "resnet50"])
def test_backbones_for_32_px_are_recognised(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = CifarResNet(architecture, width=16, stem_stride=2).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.save(made.state_dict(), tmp_path / "backbone.pt")
    (tmp_path / "config.json").write_text('{"config": {"stem_stride": 2}}')
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "backbone.pt").eval()(images), made(images))
        stride_1 = load_backbone(tmp_path / "backbone.pt", stem_stride=1).eval()(images)
        # Without settings of a run, and with the names of other ResNets for 32 px.
        named = {
            name.replace("downsample.", "shortcut."): value
            for name, value in made.state_dict().items()
        }
        torch.save({"net": named}, tmp_path / "backbone.pt")
        (tmp_path / "config.json").write_text("[")
        assert torch.equal(load_backbone(tmp_path / "backbone.pt").eval()(images), stride_1)
    with pytest.raises(UserError, match=r"conv1\.weight has the shape \[16, 3, 3, 3\] in place of"):
        load_backbone(tmp_path / "backbone.pt", "resnet18")


def test_no_file_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load_backbone(tmp_path / "nothing.pt", "resnet18")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(UserError, match="holds a Tensor"):
        load_backbone(tmp_path / "tensor.pt", "resnet18")
