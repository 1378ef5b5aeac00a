"""A head of two layers, used as a predictor or as a projector."""

from __future__ import annotations

from torch import nn


def head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear: float `[B, inputs]` to `[B, outputs]`."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )
