"""How a script's processes start and end: its device, its group of processes.

Start a script with `torchrun --nproc-per-node 2 run.py`: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.runtime.errors import UserError, require
from common.runtime.memory import keep_freed_memory
from common.runtime.precision import choose_cuda_arithmetic
from common.runtime.ranks import Ranks

# Of every wait for other processes: it must outlast rank 0's download of a data set.
TIME_LIMIT = timedelta(hours=2)
JOINING = timedelta(minutes=10)  # until every process has been started
DEVICES = "auto, cpu, cuda, cuda:1 or mps"


def start(device: str) -> Ranks:
    """Pick the device and, under torchrun, join the group.

    Args:
        device: "auto" (CUDA, else MPS, else CPU) or a torch device such as "cpu" or "cuda:1".

    Raises:
        UserError: if the device does not exist or does not train, if the environment's variables
            for torchrun are incomplete, or under `srun` without torchrun.
    """
    _require_launcher()
    world_size = _number_from_environment("WORLD_SIZE", 1)
    local_rank = _number_from_environment("LOCAL_RANK", 0)
    chosen = _pick_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        choose_cuda_arithmetic()
    if chosen.type == "cpu":
        keep_freed_memory()
    if world_size == 1:
        return Ranks(0, 1, chosen)
    require(
        chosen.type != "mps",
        "MPS trains in one process only; start without torchrun, or use --device cpu",
    )
    if not dist.is_initialized():
        is_cuda = chosen.type == "cuda"
        options = {"device_id": chosen} if is_cuda else {}
        backend = "nccl" if is_cuda else "gloo"
        dist.init_process_group(backend, timeout=TIME_LIMIT, **options, **_join(world_size))
    return Ranks(dist.get_rank(), world_size, chosen)


def _join(world_size: int) -> dict[str, Any]:
    """Meet the other processes, at the address that the environment names.

    `torchrun --max-restarts` keeps its store for all attempts, and in it the addresses of processes
    that have ended; a process that reads one before it is overwritten fails to connect. So on one
    machine each attempt has keys of its own. Several machines may count attempts differently:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun gives each attempt a new store.

    Returns:
        Arguments of `init_process_group`.

    Raises:
        UserError: if a variable is missing, or the others do not come.
    """
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=JOINING))
    except (ValueError, dist.DistError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"WORLD_SIZE is {world_size} in the environment, but the processes cannot be joined: "
            f"{reason}; start all of them with torchrun, or unset WORLD_SIZE"
        ) from None
    store.set_timeout(TIME_LIMIT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"attempt {attempt}", store)
    return {"store": store, "rank": rank, "world_size": size}


def use_every_gpu(device: str) -> None:
    """On a machine with several GPUs, if none was named, start again under torchrun on all of them.

    Call it before anything else: the process is replaced.

    Raises:
        UserError: under `srun` without torchrun.
    """
    _require_launcher()
    if "WORLD_SIZE" in os.environ or device not in ("auto", "cuda"):
        return
    if torch.cuda.device_count() > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def finish() -> None:
    """Leave the group. DDP, which refers to it, must have been deleted."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # gloo's threads end with its last owner, who waits for them. One of them may still need
    # Python's lock: torch gives it away where the owner is Python's object of the backend, and
    # keeps it, until 2.6 at least, where the owner is the group.
    group = dist.group.WORLD
    backend = group._get_backend(torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"))
    del group
    dist.destroy_process_group()
    del backend


def _number_from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    require(
        text.isdecimal() and int(text) >= min(default, 1),
        f"the environment variable {name} is {text!r}, which torchrun would not set; unset it, or "
        "start with torchrun",
    )
    return int(text)


def _require_launcher() -> None:
    """Refuse several tasks of a SLURM step that do not know of each other."""
    # SLURM_NTASKS is no sign of srun: a batch script has it too.
    tasks = _number_from_environment("SLURM_STEP_NUM_TASKS", 1)
    require(
        tasks == 1 or "WORLD_SIZE" in os.environ,
        f"srun started {tasks} separate copies of this script; start one torchrun on each "
        "machine instead (srun --ntasks-per-node 1 torchrun …), see docs/clusters.md",
    )


def _pick_device(name: str, local_rank: int, world_size: int) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; try {DEVICES}") from None
    if device.type == "cuda":
        require(
            device.index is None or world_size == 1,
            f"--device {name}: under torchrun each process uses its own GPU; use --device cuda",
        )
        index = local_rank if device.index is None else device.index
        count = torch.cuda.device_count()
        require(
            index < count,
            f"--device {name}: this machine has {count} usable CUDA GPUs; try --device auto",
        )
        return torch.device("cuda", index)
    require(name in ("cpu", "mps"), f"--device {name}: scripts do not train on this; try {DEVICES}")
    require(
        name == "cpu" or torch.backends.mps.is_available(),
        "--device mps: not available on this machine; try --device auto",
    )
    return device
