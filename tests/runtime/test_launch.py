"""How processes start: devices and environments that do not fit are refused in a sentence."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from common.runtime import launch
from common.runtime.errors import UserError


@pytest.mark.parametrize("device", ["gpu", "meta", "xpu", "cpu:5", "mps:1", ""])
def test_what_is_no_training_device_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=r"try auto, cpu, cuda, cuda:1 or mps$"):
        launch.start(device)


def test_a_missing_gpu_is_a_sentence() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 usable CUDA GPUs; try --device auto"):
            launch.start("cuda")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which torchrun would not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which torchrun would not set"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', which torchrun would not set"),
        ({"WORLD_SIZE": "2"}, "RANK expected, but not set; start all of them with torchrun"),
    ],
)
def test_a_broken_environment_is_a_sentence(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch.start("cpu")


@pytest.mark.parametrize(
    ("gpus", "device", "under_torchrun", "hands_over"),
    [
        (8, "auto", False, True),
        (8, "cuda", False, True),
        (8, "cuda:1", False, False),
        (8, "cpu", False, False),
        (8, "auto", True, False),
        (1, "auto", False, False),
    ],
)
def test_a_machine_with_several_gpus_uses_them_all(
    gpus: int,
    device: str,
    under_torchrun: bool,
    hands_over: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["run.py", "--epochs", "3"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if under_torchrun:
        monkeypatch.setenv("WORLD_SIZE", "8")
    launch.use_every_gpu(device)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu"]
    expected = [[sys.executable, *launcher, "run.py", "--epochs", "3"]]
    assert started == (expected if hands_over else [])


def test_srun_alone_is_refused_and_a_batch_script_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "execv", lambda path, arguments: pytest.fail("started again"))
    # As SLURM 22.05 sets them: in a batch script of two tasks, in a step of one, in one of two.
    for variables in ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert launch.start("cpu").world_size == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for start in (launch.start, launch.use_every_gpu):
        with pytest.raises(UserError, match=r"2 separate copies.*one torchrun on each machine"):
            start("cpu")


@pytest.mark.parametrize("machines", [1, 2])
def test_a_restart_does_not_read_the_addresses_of_the_attempt_before(
    machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchruns = dist.TCPStore("127.0.0.1", 0, is_master=True)
    torchruns.set("address", "of a process that has ended")
    variables = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(torchruns.port),
        "RANK": "1",
        "WORLD_SIZE": str(2 * machines),
        "LOCAL_WORLD_SIZE": "2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = launch._join(2 * machines)
    assert (options["rank"], options["world_size"]) == (1, 2 * machines)
    assert torchruns.check(["address"])
    # Several machines may count their restarts differently.
    assert options["store"].check(["address"]) == (machines == 2)
    options["store"].set("address", "of this process")
    kept = b"of this process" if machines == 2 else b"of a process that has ended"
    assert torchruns.get("address") == kept
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert launch._join(2 * machines)["store"].check(["address"])


def test_processes_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "JOINING", timedelta(seconds=1))
    with pytest.raises(UserError, match=r"cannot be joined: .*1/2 .*; start all of them with tor"):
        launch.start("cpu")
