"""Child processes whose rights or room tests can take away."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from common.runtime import launch
from common.runtime.ranks import Ranks


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forking() -> Any:
    """Processes that start in milliseconds, while importing torch again takes seconds."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    return multiprocessing.get_context("fork")


def in_child(function: Callable[[], Any]) -> Any:
    """Call a function in a process of its own, where it may limit or lower what it may do."""
    context = forking()
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        sys.stdout = sys.stderr = io.StringIO()  # pytest's are files, which a limit would hit
        try:
            sending.send((True, function()))
        except BaseException:
            sending.send((False, traceback.format_exc()))

    process = context.Process(target=run)
    process.start()
    try:
        assert receiving.poll(60), "no answer from the child process"
        is_fine, answer = receiving.recv()
    finally:
        process.kill()
        process.join()
    if not is_fine:
        raise AssertionError(answer)
    return answer


def limit_files_to(size: int | None) -> None:
    """Let no file of this process grow beyond `size` bytes; it fails as on a full disk."""

    soft = resource.RLIM_INFINITY if size is None else size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))


def on_two_ranks(function: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """What a test module's function gives on each of two processes that are joined by gloo."""
    spawn_ranks(_on_a_rank, function, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def spawn_ranks(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call `function(rank, *arguments)` in processes that can join each other as under torchrun.

    As torchrun's, the store is this process's: a port that was only free before may be taken.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        torch.multiprocessing.spawn(_with_rank, (function, *arguments), nprocs=count)


def _with_rank(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(rank, *arguments)


def _on_a_rank(rank: int, function: Callable[[Ranks], Any], folder: Path) -> None:
    ranks = launch.start("cpu")
    torch.save(function(ranks), folder / f"{rank}.pt")
    launch.finish()
