"""Barlow Twins' loss forward and backward at batch 512 and 8192 dimensions: memory and time.

    python benchmarks/cross_correlation.py

The loss as this project computes it, from inner products between images, against the same loss
with the cross-correlation matrix `[8192, 8192]` (256 MiB) written out, as in the method's published
code. Each runs in a process of its own; memory is what the process's peak grows by beyond the
projections and one pass over a small batch.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import tyro
from torch import Tensor

from common.losses.cross_correlation import cross_correlation_loss, standardise
from common.runtime.ranks import Ranks
from contest import machine

BATCH, DIMENSIONS, WEIGHT = 512, 8192, 0.0051
ROUNDS = 3


def written_out(z_1: Tensor, z_2: Tensor) -> Tensor:
    """Equation 1 with C and its elements off the diagonal."""
    c = standardise(z_1).T @ standardise(z_2) / len(z_1)
    d = len(c)
    off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:]
    return (1 - c.diagonal()).square().sum() + WEIGHT * off_diagonal.square().sum()


def ours(z_1: Tensor, z_2: Tensor) -> Tensor:
    return cross_correlation_loss(z_1, z_2, WEIGHT, Ranks(0, 1, torch.device("cpu")))


def peak() -> float:
    """MiB, the highest so far of this process (ru_maxrss is KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, list[float], Tensor, Tensor]:
    """Peak MiB, processor seconds of each round, the loss and the first view's gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, DIMENSIONS)
    shared = torch.randn(shape, generator=generator)
    z_1, z_2 = (shared + torch.randn(shape, generator=generator) for _ in range(2))
    loss(z_1[:2, :8].clone().requires_grad_(), z_2[:2, :8]).backward()
    z_1.requires_grad_()
    z_2.requires_grad_()
    before, seconds = peak(), []
    for _ in range(ROUNDS):
        z_1.grad = z_2.grad = None
        started = time.process_time()
        value = loss(z_1, z_2)
        value.backward()
        seconds.append(time.process_time() - started)
    return peak() - before, seconds, value.detach(), z_1.grad


def main() -> None:
    context = multiprocessing.get_context("spawn")
    results = []
    for contestant in (written_out, ours):
        with context.Pool(1) as pool:
            results.append(pool.apply(partial(measure, contestant)))
    (memory_c, seconds_c, value_c, gradient_c), (memory, seconds, value, gradient) = results
    ratio = statistics.median(seconds_c) / statistics.median(seconds)
    apart = float((gradient - gradient_c).norm() / gradient_c.norm())
    print(f"Barlow Twins' loss, forward and backward, {BATCH} × {DIMENSIONS}  [{machine()}]")
    print(f"  C [{DIMENSIONS}, {DIMENSIONS}] written out     {memory_c:8.0f} MiB   1.00 × as fast")
    print(f"  inner products between images  {memory:8.0f} MiB   {ratio:.2f} × as fast")
    print(f"  relative difference: loss {abs(value / value_c - 1):.1e}, gradient {apart:.1e}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
