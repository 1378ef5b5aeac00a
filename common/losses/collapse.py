"""How much of its space a representation still uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Well below any run in results/ that learned (0.5 and more at the end), above a collapsed one.
COLLAPSED_BELOW = 0.1


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """A measure of collapse: √d · mean over dimensions of the standard deviation of z/‖z‖.

    Near 1 when directions are spread evenly over the sphere, 0 when all are equal (figure 2 of
    Chen & He, *Exploring Simple Siamese Representation Learning*, 2021).

    Args:
        z: `[B, d]`, any floating-point dtype.

    Returns:
        float32 scalar.
    """
    directions = F.normalize(z.float(), dim=1)
    return directions.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5
