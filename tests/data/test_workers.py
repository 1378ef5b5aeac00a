"""common/data/workers.py in real processes: whatever happens, a run and its workers end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.data import workers
from common.data.loader import CropLoader, Loading
from common.data.photographs import RandomCrops
from common.data.shapes import shapes
from common.data.workers import require_shared_memory
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from scripts import ROOT, command_line, on_two_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
# A loop over batches, in which something happens in the fourth step.
LOOP = """
import os, signal, sys, time
import torch
from common.data.loader import CropLoader, Loading
from common.data.photographs import RandomCrops
from common.runtime.ranks import Ranks
from common.training.signals import StopFlag

{before}
ranks = Ranks(0, 1, torch.device("cpu"))
stop = StopFlag(ranks)
images = [torch.zeros(3, 40, 40, dtype=torch.uint8)] * 400
loader = CropLoader(RandomCrops(images, 2, 32, (0.2, 1.0), 0), 4, Loading(2), ranks)
for step, _, _ in loader.epoch(1, 0, 100):
    workers = [worker.pid for worker in loader.loader._iterator._workers]
    if step == 3:
        print("workers", *workers, flush=True)
{happens}
    time.sleep(0.05)
    if stop.requested:
        print("stopped", flush=True)
        sys.exit(stop.exit_status)
"""
HAPPENS = {
    "an error": ('raise RuntimeError("no memory in a step")', 1, "no memory in a step"),
    "a worker is killed": ("os.kill(workers[0], signal.SIGKILL)", 1, "killed by signal: Killed"),
    "a worker crashes": ("os.kill(workers[1], signal.SIGSEGV)", 1, "segmentation fault"),
    "the run is killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    "a stop for all": ("os.killpg(0, signal.SIGTERM)", 128 + signal.SIGTERM, ""),
}


def loop(happens: str, before: str = "") -> list[str]:
    text = LOOP.replace("{before}", before).replace("{happens}", f"        {happens}")
    return [sys.executable, "-c", text]


def is_alive(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def end_of(arguments: list[str], seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run in a process group of its own, as a shell would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=seconds,
        start_new_session=True,
        env=environment,
    )


@pytest.mark.parametrize("what", HAPPENS)
def test_a_run_ends_and_takes_its_workers_along(what: str) -> None:
    happens, status, message = HAPPENS[what]
    done = end_of(loop(happens))
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    pids = [int(pid) for pid in re.search(r"workers (.*)", done.stdout)[1].split()]
    assert len(pids) == 2
    patience = time.monotonic() + 20  # workers look every five seconds whether the run is there
    while any(map(is_alive, pids)):
        assert time.monotonic() < patience, "a worker is left over"
        time.sleep(0.1)


def test_a_stop_for_all_while_workers_start_is_a_stop() -> None:
    """The signal arrives when DataLoader has prepared a worker, and before it calls ours."""
    before = """
import warnings
warnings.filterwarnings("ignore", "This DataLoader will create")  # on one core
set_num_threads = torch.set_num_threads
def stop_all(number):  # a worker calls it
    os.killpg(0, signal.SIGTERM)
    set_num_threads(number)
torch.set_num_threads = stop_all
"""
    done = end_of(loop("pass", before))
    assert (done.returncode, done.stdout, done.stderr) == (143, "stopped\n", "")


def test_an_error_on_one_of_two_ranks_ends_both(tmp_path: Path) -> None:
    images, _ = shapes(40, 48, seed=0)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        path = tmp_path / "images" / f"{index}.jpg"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    script = tmp_path / "script.py"
    script.write_text("""
import os, tyro
import simsiam_imagenet.run as script

parts, calls = script.loss_parts, []
def failing(*arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("no memory in a step")
    return parts(*arguments)

script.loss_parts = failing
script.main(tyro.cli(script.Config))
""")
    settings = {
        "backbone": "resnet18",
        "projector-dim": 8,
        "predictor-dim": 8,
        "image-size": 32,
        "batch-size": 8,
        "workers": 2,
        "device": "cpu",
        "data-root": tmp_path / "images",
    }
    arguments = command_line(str(script), settings, "--run-dir", str(tmp_path / "run"))
    done = end_of(on_two_ranks(arguments), seconds=120)
    assert done.returncode == 1
    assert "RuntimeError: no memory in a step" in done.stderr


# Shared memory -----------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_shared_is_one_sentence() -> None:
    """Without room a worker's batch was dropped, and the run waited for it for ever."""
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    done = end_of(loop("pass", before))
    assert done.returncode == 1
    assert "a loader process got no shared memory" in done.stderr


def test_a_batch_that_cannot_be_sent_ends_the_run() -> None:
    """Here its file descriptor cannot be: the worker may open no more."""
    before = """
import resource
from common.data import photographs
stack = photographs.stack
def without_descriptors(items):
    batch = stack(items)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return batch
import common.data.loader
common.data.loader.stack = without_descriptors
"""
    done = end_of(loop("pass", before))
    assert done.returncode == 1
    assert "Too many open files" in done.stderr
    assert "exited unexpectedly" in done.stderr


def test_shared_memory_is_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 154 MB, four ready in each process, and one in use."""
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    batch = 512 * 2 * 3 * 224 * 224
    usage.free = 13 * batch
    require_shared_memory(batch, workers=3, prefetch=4, per_machine=1)
    usage.free -= 1
    with pytest.raises(UserError, match=r"use --workers 2, or make it larger"):
        require_shared_memory(batch, workers=3, prefetch=4, per_machine=1)
    require_shared_memory(batch, workers=2, prefetch=4, per_machine=1)
    with pytest.raises(UserError, match=r"use --workers 1, or make it larger"):
        require_shared_memory(batch, workers=2, prefetch=4, per_machine=2)
    usage.free = 64 * 10**6
    with pytest.raises(UserError) as caught:
        require_shared_memory(batch, workers=2, prefetch=4, per_machine=1)
    assert str(caught.value) == (
        "2 loader processes a rank, each with 4 batches of 154 MB ready, need 1,387 MB of shared "
        f"memory, and {tmp_path} has 64 MB free; use --workers 0 (loads in the training process), "
        "or make it larger (docker run --shm-size)"
    )
    require_shared_memory(batch, workers=0, prefetch=4, per_machine=1)


def test_shared_memory_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to open shared memory object: Permission denied (13)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(UserError, match=r"cannot be used \(.*Permission denied.*--workers 0"):
        require_shared_memory(1000, workers=1, prefetch=1, per_machine=1)
    require_shared_memory(1000, workers=0, prefetch=1, per_machine=1)


def test_too_little_room_is_told_before_training() -> None:
    crops = RandomCrops([torch.zeros(3, 40, 40, dtype=torch.uint8)] * 8, 2, 32, (0.2, 1.0), 0)
    with pytest.raises(UserError, match=r"^1000 loader processes a rank, .* use --workers \d"):
        CropLoader(crops, 4, Loading(1000, prefetch=10**6), ALONE)


def test_batches_of_workers_are_shared_memory() -> None:
    images = [torch.full((3, 40, 40), index, dtype=torch.uint8) for index in range(8)]
    crops = RandomCrops(images, 2, 32, (0.2, 1.0), 0)
    for count in (0, 1):
        loader = CropLoader(crops, 4, Loading(count), ALONE)
        loader.batches.steps = range(2)
        batches = list(loader.loader)
        assert [loaded.crops.is_shared() for loaded in batches] == [bool(count)] * 2
        for loaded in batches:
            expected = loaded.indices.to(torch.uint8).view(1, 4, 1, 1, 1)
            assert torch.equal(loaded.crops, expected.expand(2, 4, 3, 32, 32))
