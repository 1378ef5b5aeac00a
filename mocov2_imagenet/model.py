"""MoCo v2's query network for ImageNet, and the passes of its key network.

The key network is a copy (`common/networks/ema.py`). BatchNorm's statistics would tell the network
which images were together in a pass, and so which key belongs to a query, without any learning
about images. Two rules prevent that: few images share statistics, and in the key pass they do so
with other images than in the query pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks.resnet import Depth, imagenet_resnet
from common.runtime.ranks import Ranks, send


class MoCo(nn.Module):
    """Backbone f, projector g: images `[B, 3, H, W]` to queries or keys g(f(x)), float `[B, d]`.

    Args:
        architecture: of the backbone, torchvision's.
        hidden_dim: of the projector, which has no BatchNorm.
        projector_dim: d.
        norm_batch: how many images, one after the other, share BatchNorm's statistics.
    """

    def __init__(
        self, architecture: Depth, hidden_dim: int, projector_dim: int, norm_batch: int
    ) -> None:
        super().__init__()
        self.norm_batch = norm_batch
        self.backbone = imagenet_resnet(architecture)
        self.projector = nn.Sequential(
            nn.Linear(self.backbone.feature_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, projector_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = [self.backbone(part) for part in images.split(self.norm_batch)]
        return self.projector(torch.cat(features))


class ShuffledKeys:
    """Makes a step's keys: the ranks share the images of the batch in another order.

    Args:
        key_pass: a view of some images to their keys, uint8 `[n, 3, H, W]` to float `[n, d]`.
        order: a permutation of the global batch, int64 `[B · world_size]` on the CPU, the same on
            every rank.
        ranks: whose shares make the global batch.
    """

    def __init__(self, key_pass: Callable[[Tensor], Tensor], order: Tensor, ranks: Ranks) -> None:
        self.key_pass = key_pass
        self.order = send(order, ranks.device)
        self.ranks = ranks
        # Of each view so far, the whole batch's in its own order: float32 [B · world_size, d].
        self.made: list[Tensor] = []

    @torch.no_grad()
    def of(self, view: Tensor, z: Tensor | None = None) -> Tensor:
        """Keys of a view of this rank's images, uint8 `[B, 3, H, W]`.

        Args:
            z: not needed; `loss_parts` gives it to every target.

        Returns:
            float32 `[B, d]` of length 1 each, without graph.
        """
        rows = self.ranks.share(len(self.order))
        shuffled = self.ranks.join_batch(view)[self.order[rows]]
        keys = self.ranks.join_batch(F.normalize(self.key_pass(shuffled).float(), dim=1))
        self.made.append(torch.empty_like(keys).index_copy_(0, self.order, keys))
        return self.made[-1][rows]
