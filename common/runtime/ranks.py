"""One process, or several under torchrun: the same code for both.

With several processes every function here is an operation of the group; with one it is local.
"""

from __future__ import annotations

import os
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from common.runtime.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def per_machine(self) -> int:
        """How many processes of the group share this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1

    def share(self, batch_size: int) -> slice:
        """The rows of a global batch that belong to this rank.

        Raises:
            UserError: if the batch does not divide evenly.
        """
        if batch_size % self.world_size:
            raise UserError(
                f"a global batch of {batch_size} does not divide among {self.world_size} "
                f"processes; make --batch-size a multiple of {self.world_size}, or start another "
                "number of processes (torchrun --nproc-per-node)"
            )
        local = batch_size // self.world_size
        return slice(self.rank * local, (self.rank + 1) * local)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this device; with several processes, wrapped in DDP."""
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        with warnings.catch_warnings():
            # Newer releases have another name for broadcast_buffers and warn; older know only it.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                module,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                # Running averages need no agreement while training; see broadcast_buffers.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Copy rank 0's buffers to all ranks, for evaluation and checkpoints."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks wait for each other."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def agree(self, state: object) -> bool:
        """Whether `repr(state)` is the same on every rank; all ranks wait for each other."""
        own = zlib.crc32(repr(state).encode())
        everyones = self.join(torch.tensor([[own]], device=self.device))
        return bool((everyones == own).all())

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Join each rank's rows of a set of `count`: `[n, …]` to `[count, …]`, on every rank.

        A rank has the rows rank, rank + world_size, … of the set.
        """
        if self.world_size == 1:
            return rows
        longest = -(-count // self.world_size)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def join(self, columns: Tensor) -> Tensor:
        """`[B, k]` of every rank side by side: `[B, k · world_size]`, on every rank."""
        if self.world_size == 1:
            return columns
        parts = [torch.empty_like(columns) for _ in range(self.world_size)]
        dist.all_gather(parts, columns.contiguous())
        return torch.cat(parts, dim=1)

    def join_batch(self, rows: Tensor) -> Tensor:
        """Every rank's `share` `[B, …]` of a batch, in order: `[B · world_size, …]`, on every rank.

        Gradients come back to each rank's own rows as the sum over all ranks' losses; DDP then
        divides by the number of ranks, so means over a share add up to the mean over the batch.
        """
        return rows if self.world_size == 1 else _JoinBatch.apply(rows, self)

    def wait(self) -> None:
        """Wait until every rank reaches this point."""
        if self.world_size > 1:
            dist.barrier()


class _JoinBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(ranks.world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy: the incoming gradient may be another function's too.
        total = ctx.ranks.sum(gradient.clone(memory_format=torch.contiguous_format))
        return total[ctx.ranks.share(len(total))], None


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Within it, DDP's forward and backward passes leave gradients unreduced."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, out of its DDP wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` without waiting for work queued there."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
