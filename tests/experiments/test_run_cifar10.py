"""simclr_cifar10 and byol_cifar10 as a user types them; what all runs share is in test_run.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import byol_cifar10.loss
import byol_cifar10.run
import simclr_cifar10.run
from byol_cifar10.model import online_network
from common.runtime.errors import UserError
from common.training import run as run_setup
from published_files import put_cifar
from scripts import (
    assert_equal,
    assert_target_follows,
    command_line,
    metrics,
    on_two_ranks,
    run,
    run_here,
    state,
)

EXPERIMENTS = ["simclr_cifar10", "byol_cifar10"]
SMALL = {
    "dataset": "folder",
    "width": 8,
    "hidden-dim": 16,
    "projector-dim": 8,
    "epochs": 2,
    "warmup-epochs": 1,
    "batch-size": 40,  # 5 steps an epoch
    "base-lr": 0.3,
    "linear-epochs": 1,
    "device": "cpu",
}


def train(experiment: str, run_dir: Path, **settings: object) -> None:
    run_here(experiment, {**SMALL, **settings}, run_dir)


def start_of_byol() -> torch.nn.Module:
    torch.manual_seed(0)
    return online_network("resnet18", 8, hidden_dim=16, projector_dim=8)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_stopped_by_max_steps_and_continued_is_the_same_run(
    experiment: str, folder: Path, tmp_path: Path
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    train(experiment, whole, data_root=str(folder))
    rows = metrics(whole)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 2]
    assert [row["lr"] for row in rows[1:3]] == pytest.approx([0.3 * 40 / 256, 0])
    trained = {"epoch", "loss", "symmetric", "asymmetric", "spread", "lr", "knn"}
    for row in rows[1:3]:
        assert set(row) == trained
        assert row["loss"] == pytest.approx(row["symmetric"] + row["asymmetric"], abs=1e-6)
    assert rows[2]["loss"] < rows[1]["loss"]
    assert "linear" in rows[3]

    train(experiment, run_dir, data_root=str(folder), max_steps=1, linear_epochs=0, knn_every=0)
    progress = state(run_dir)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    if experiment == "byol_cifar10":
        assert_target_follows(start_of_byol(), run_dir, online_passes=4)
    train(experiment, run_dir, data_root=str(folder))
    assert metrics(run_dir) == rows
    last = state(run_dir)
    (group,) = last["optimiser"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    for part in ("model", "optimiser", *(["target"] if "target" in last else [])):
        assert_equal(last[part], state(whole)[part], part)
    for name in ("best.pt", "linear_last.pt", "backbone.pt"):
        assert_equal(state(run_dir, name), state(whole, name), name)
    for name, value in state(run_dir, "backbone.pt").items():
        assert torch.equal(value, last["model"][f"backbone.{name}"]), name


def test_a_compiled_run_goes_on_without_and_is_the_same_within_rounding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile up to its last stage, which would need a C++ compiler."""
    compiled, functions = [], []
    compile_module, compile_function = torch.nn.Module.compile, torch.compile

    # `options` are the last stage's.
    def module_but_for_the_last_stage(module: torch.nn.Module, options: object) -> None:
        compiled.append(module)
        compile_module(module, fullgraph=True)

    def but_for_the_last_stage(
        function: Callable[..., object], options: object = None, **further: object
    ) -> Callable[..., object]:
        functions.append(function)
        return compile_function(function, backend="aot_eager", **further)

    monkeypatch.setattr(torch.nn.Module, "compile", module_but_for_the_last_stage)
    monkeypatch.setattr(torch, "compile", but_for_the_last_stage)
    monkeypatch.setattr(run_setup, "require_compiler", lambda device: None)
    small = {"data_root": str(folder), "backbone": "resnet10", "linear_epochs": 0, "knn_every": 0}

    def trained(name: str, **further: object) -> dict:
        train("byol_cifar10", tmp_path / name, **small, **further)
        return state(tmp_path / name)

    whole = trained("whole", max_steps=4)
    assert not compiled
    assert not functions
    trained("run", max_steps=2, compile=True)
    assert len(compiled) == 3  # the online network, the target's backbone and projector
    assert byol_cifar10.loss.pair_loss in functions
    continued = trained("run", max_steps=4)
    assert len(compiled) == 3
    for part in ("model", "target"):
        torch.testing.assert_close(continued[part], whole[part], rtol=1e-4, atol=1e-5)


def test_cifar100_has_100_classes_in_knn_and_linear_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_cifar("cifar100", tmp_path, monkeypatch, count=240)
    settings = {"dataset": "cifar100", "data_root": str(tmp_path), "backbone": "resnet10"}
    run_dir = tmp_path / "run"
    train("simclr_cifar10", run_dir, **settings, max_steps=1, knn_every=0)
    assert state(run_dir, "linear_last.pt")["classifier"]["weight"].shape == (100, 64)
    rows = metrics(run_dir)
    assert [set(row) & {"knn", "linear"} for row in rows] == [{"knn"}, {"knn"}, {"linear"}]


def test_without_heavy_views_there_is_no_asymmetric_loss(folder: Path, tmp_path: Path) -> None:
    short = {"regime": "baseline", "max_steps": 1, "linear_epochs": 0, "knn_every": 0}
    train("byol_cifar10", tmp_path, data_root=str(folder), **short)
    row = metrics(tmp_path)[1]
    assert row["loss"] == row["symmetric"]
    assert "asymmetric" not in row
    assert_target_follows(start_of_byol(), tmp_path, online_passes=2)


def test_simclrs_negatives_come_from_both_ranks(folder: Path, tmp_path: Path) -> None:
    short = {"linear-epochs": 0, "knn-every": 0, "max-steps": 1}
    settings = {**SMALL, **short, "data-root": folder, "run-dir": tmp_path}
    run(on_two_ranks(command_line("simclr_cifar10/run.py", settings)))
    row = metrics(tmp_path)[1]
    # Untrained, all are about as near as the positive: the log of how many there are.
    assert row["symmetric"] == pytest.approx(math.log(2 * 40 - 1), abs=0.2)
    assert row["asymmetric"] == pytest.approx(2 * 0.5 * math.log(40), abs=0.2)


@pytest.mark.parametrize(
    ("module", "wrong", "message"),
    [
        (simclr_cifar10.run, {"temperature": 0.0}, "--temperature must be between 0.001"),
        (byol_cifar10.run, {"ema_decay": 1.1}, "--ema-decay must be between 0 and 1; it is 1.1"),
    ],
)
def test_what_a_user_can_mend_stops_before_any_work(
    module: object, wrong: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        module.main(module.Config(run_dir=str(tmp_path / "run"), **wrong))
    assert not (tmp_path / "run").exists()
