"""README.md and docs/: their code runs, their links lead somewhere, their flags are settings."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import numpy
import pytest
import torch

import features
from common.data.shapes import shapes
from common.evaluation import test_runner
from common.networks.resnet import CifarResNet, imagenet_resnet
from simsiam_cifar10.model import SimSiam

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted(path.parent.name for path in ROOT.glob("*/run.py"))
# Options of torchrun, SLURM, Docker, TensorBoard and of benchmarks.
OTHER_FLAGS = re.compile(
    "nnodes|nproc-per-node|rdzv-id|rdzv-backend|rdzv-endpoint|max-restarts|shutdown-timeout|signal|signals-to-handle|index-url|"
    "requeue|nodes|ntasks-per-node|gpus-per-node|cpus-per-task|time|partition|account|gpus|shm-size|init|"
    "cpus|logdir|help|curves"
)


def code(page: str, number: int = 0) -> str:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[number]


def test_readme_is_short() -> None:
    assert README.count("\n") <= 160


def test_a_backbone_loads_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = CifarResNet("resnet18", width=64)
    torch.save(trained.state_dict(), "backbone.pt")
    names: dict[str, CifarResNet] = {}
    exec(code("README.md"), names)
    assert torch.equal(names["backbone"].conv1.weight, trained.conv1.weight)


def test_a_loop_of_ones_own_trains_as_shown() -> None:
    torch.manual_seed(0)
    model = SimSiam("resnet18", width=8, projector_dim=16, predictor_dim=8)
    before = [parameter.clone() for parameter in model.parameters()]
    images, _ = shapes(8, 32, seed=0)
    names = {
        "model": model,
        "optimiser": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [images],
    }
    exec(code("docs/own-method.md"), names)
    after = list(model.parameters())
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_backbone_loads_elsewhere_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = imagenet_resnet("resnet50")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        trained(images)  # moves BatchNorm's averages
        expected = trained.eval()(images)
        torch.save(trained.state_dict(), "backbone.pt")
        names: dict[str, torch.nn.Module] = {}
        exec(code("docs/weights.md"), names)
        assert torch.equal(names["features"].eval()(images), expected)
        names["network"].fc = torch.nn.Identity()
        assert torch.equal(names["network"].eval()(images), expected)


def test_features_load_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = {"paths": ["b/1.jpg", "a/2.jpg"], "labels": [1, 0], "class_names": ["a", "b"]}
    numpy.savez("features.npz", features=numpy.eye(2, 3, dtype=numpy.float32), **file)
    names: dict[str, numpy.ndarray] = {}
    exec(code("docs/weights.md", 1), names)
    assert names["features"].shape == (2, 3)
    assert names["paths"].tolist() == file["paths"]
    assert names["names"].tolist() == ["b", "a"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:common|docs|results|benchmarks|\w+_cifar10)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"`(\w+\.py)`", text):
        assert [*ROOT.glob(script), *ROOT.glob(f"*/{script}")], script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_is_a_setting(page: Path) -> None:
    configs = [importlib.import_module(f"{name}.run").Config for name in EXPERIMENTS]
    configs += [test_runner.Config, features.Config]
    settings = {field.name for config in configs for field in fields(config)}
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text()):
        name = flag.removeprefix("no-").replace("-", "_")
        assert name in settings or OTHER_FLAGS.fullmatch(flag), f"--{flag}"


def test_the_table_names_every_experiment() -> None:
    for name in EXPERIMENTS:
        assert re.search(rf"^\| `{name}`", README, re.MULTILINE), name
