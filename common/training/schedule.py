"""Learning rates, constant within an epoch."""

from __future__ import annotations

import math

from common.runtime.errors import require


def warmup_cosine(epoch: int, epochs: int, warmup_epochs: int, peak: float) -> float:
    """The CIFAR-10 schedule: linear warm-up, then a cosine to 0 in the last epoch.

    The authors' script: `linspace(0, peak, warmup)[e]` while e < warmup, so the warm-up spans
    warmup − 1 steps and is over in epoch warmup − 1; then `peak · ½(1 + cos(π(e − w)/(E − w)))`.

    Args:
        epoch: e, 1..epochs.
        warmup_epochs: w, below `epochs`.
        peak: the highest learning rate.
    """
    if epoch < warmup_epochs:
        return peak * epoch / (warmup_epochs - 1)
    return cosine(epoch, epochs, peak, warmup_epochs)


def cosine(epoch: int, epochs: int, peak: float, warmup_epochs: int = 0) -> float:
    """The ImageNet schedule, also linear evaluation's: `peak · ½(1 + cos(πe/E))`.

    After a linear warm-up of w epochs, `peak · (e + 1)/w` while e < w, so that the w-th epoch has
    the peak; then the cosine of the E − w other epochs, e counted from the end of the warm-up.

    Args:
        epoch: e, 0..epochs − 1.
        epochs: E.
        peak: the highest learning rate.
        warmup_epochs: w, below `epochs`.
    """
    if epoch < warmup_epochs:
        return peak * (epoch + 1) / warmup_epochs
    share = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def check_warmup(epochs: int, warmup_epochs: int, least_epochs: int = 1) -> None:
    """Refuse lengths that a schedule cannot have.

    Args:
        least_epochs: 2 for `warmup_cosine`, whose last epoch has a learning rate of 0.

    Raises:
        UserError: for fewer epochs than these, or a warm-up as long as all of them.
    """
    require(epochs >= least_epochs, f"--epochs must be at least {least_epochs}")
    require(
        warmup_epochs < epochs,
        f"--warmup-epochs {warmup_epochs} must be less than --epochs {epochs}",
    )
