"""Random generators named by what they are for, so that any draw can be made again on its own."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator_for(purpose: str, *key: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, e.g. ("views", seed, epoch, step).

    Args:
        purpose: keeps streams with equal keys apart. (torch keeps 32 bits of the seed, so among
            millions of keys some share a stream.)
        key: integers, at least 0.
    """
    # SeedSequence pads with zeros: the length keeps (1,) and (1, 0) apart.
    entropy = np.random.SeedSequence((zlib.crc32(purpose.encode()), len(key), *key))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which an epoch visits `count` images: int64 `[count]` on the CPU."""
    return torch.randperm(count, generator=generator_for("order", seed, epoch))
