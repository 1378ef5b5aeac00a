"""Features of a whole data set from a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.runtime.ranks import Ranks

CHUNK = 500  # images at a time; bounds the memory, not the result


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    ranks: Ranks,
    check: Callable[[], None],
) -> Tensor:
    """This rank's share of the features: those of images rank, rank + world_size, …

    Args:
        backbone: put in eval mode meanwhile.
        images: uint8 `[N, 3, H, W]`, the whole set, on any device.
        encode: uint8 images `[B, 3, H, W]` on the device to features `[B, d]`.
        check: called before each chunk; may raise to stop.

    Returns:
        float32 `[ceil((N − rank) / world_size), d]` on the device.
    """
    was_training = backbone.training
    backbone.eval()
    features = []
    try:
        # Every rank counts the same chunks, so that `check` may wait for all of them.
        for start in range(0, len(images), CHUNK * ranks.world_size):
            check()
            stop = start + CHUNK * ranks.world_size
            chunk = images[start + ranks.rank : stop : ranks.world_size]
            if len(chunk):
                features.append(encode(chunk.to(ranks.device)).float())
        if not features:  # fewer images than ranks
            features.append(encode(images[:1].to(ranks.device))[:0].float())
    finally:
        backbone.train(was_training)
    return torch.cat(features)
