"""A target network: an exponential moving average (EMA) of an online network's parameters."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def make_target(online: Network) -> Network:
    """A copy of the online network that takes no gradient, in the same mode (train or eval).

    Args:
        online: not wrapped in DDP: the target has no gradients to reduce.
    """
    return copy.deepcopy(online).requires_grad_(False)


@torch.no_grad()
def update(target: nn.Module, online: nn.Module, decay: float) -> None:
    """target ← decay · target + (1 − decay) · online, in place, for every parameter.

    Grill et al., *Bootstrap Your Own Latent*, 2020 (ξ ← τξ + (1 − τ)θ). Buffers do not change:
    the target's BatchNorm averages come from its own passes.

    Args:
        target: from `make_target`.
        online: has parameters of the same order, shapes and dtypes; it may be wrapped in DDP.
        decay: τ in [0, 1]; 1 keeps the target as it is, 0 copies the online network.
    """
    # lerp: where target and online are equal, rounding does not change the target.
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - decay)
