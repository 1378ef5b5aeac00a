"""Loader processes: the signals they ignore, how they end, and the shared memory they fill."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from common.runtime.errors import UserError
from common.runtime.memory import keep_freed_memory
from common.runtime.stop_signals import STOP_SIGNALS

SHARED_MEMORY = Path("/dev/shm")  # Linux; other systems have no such limit


class WorkerLoader(DataLoader):
    """A DataLoader whose processes ignore requests to stop, and end with the training process.

    A terminal, torchrun or a cluster sends `STOP_SIGNALS` to a whole group of processes, but the
    training process needs batches until its checkpoint is written. Python ends such processes by
    SIGTERM when it exits, and waits for them; so they are killed before that.

    On Linux they are forked, and share the list of files: Python's default until 3.13.
    """

    def __init__(self, *arguments: Any, num_workers: int = 0, **options: Any) -> None:
        forks = num_workers > 0 and sys.platform == "linux"
        context = "fork" if forks else None
        super().__init__(
            *arguments, num_workers=num_workers, multiprocessing_context=context, **options
        )

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            return super().__iter__()
        _kill_workers_at_exit()
        with _stop_signals_blocked():  # a new process inherits it: it has no unprotected moment
            return super().__iter__()


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@cache
def _kill_workers_at_exit() -> None:
    atexit.register(_kill_workers)  # called before multiprocessing's own, which was there first


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def start_worker(worker: int) -> None:
    """What a loader process does first."""
    keep_freed_memory()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A batch that cannot be sent would be dropped, and the training process wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, batch: object) -> None:
    traceback.print_exception(error)
    os._exit(1)


def require_shared_memory(batch_bytes: int, workers: int, prefetch: int, per_machine: int) -> None:
    """Refuse to load batches that the shared memory has no room for.

    Args:
        batch_bytes: of one rank's batch.
        workers, prefetch: loader processes of a rank, and batches that each keeps ready.
        per_machine: ranks on this machine, which fill the same shared memory.

    Raises:
        UserError: with the numbers, and how many processes there is room for.
    """
    if not workers:
        return
    try:
        torch.zeros(1).share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"loader processes hand over batches in shared memory, which cannot be used ({error}); "
            "use --workers 0, which loads in the training process"
        ) from error
    if not SHARED_MEMORY.is_dir():
        return
    of_a_worker = batch_bytes * prefetch * per_machine
    free = shutil.disk_usage(SHARED_MEMORY).free
    # One more batch is in use while all others are ready.
    need = of_a_worker * workers + batch_bytes * per_machine
    if need > free:
        most = max(0, (free - batch_bytes * per_machine) // of_a_worker)
        raise UserError(
            f"{workers} loader processes a rank, each with {prefetch} batches of "
            f"{_megabytes(batch_bytes)} ready, need {_megabytes(need)} of shared memory, and "
            f"{SHARED_MEMORY} has {_megabytes(free)} free; use --workers {most}"
            f"{' (loads in the training process)' * (most == 0)}, or make it larger (docker run "
            "--shm-size)"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
