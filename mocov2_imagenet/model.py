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
from common.networks.siamese import Siamese
from common.runtime.errors import require
from common.runtime.ranks import Ranks, send


class MoCo(Siamese):
    """MoCo v2's network over torchvision's ResNet: queries, or keys, are z; there is no predictor.

    Args:
        architecture: of the backbone.
        hidden_dim: the dimension of the projector's hidden layer, which has no BatchNorm.
        projector_dim: d, the dimension of queries and keys.
        norm_batch: how many images, one after the other, share BatchNorm's statistics.
    """

    def __init__(
        self, architecture: Depth, hidden_dim: int, projector_dim: int, norm_batch: int
    ) -> None:
        backbone = imagenet_resnet(architecture)
        projector = nn.Sequential(
            nn.Linear(backbone.feature_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, projector_dim),
        )
        super().__init__(backbone, projector)
        self.norm_batch = norm_batch

    def project(self, images: Tensor) -> Tensor:
        features = [self.backbone(part) for part in images.split(self.norm_batch)]
        return self.projector(torch.cat(features))


def checked_norm_batch(norm_batch: int, batch_size: int, ranks: Ranks) -> int:
    """How many images share BatchNorm's statistics: at most a process's share of the batch.

    Raises:
        UserError: if it would give the positive key away, or does not divide the share.
    """
    share = batch_size // ranks.world_size
    used = min(norm_batch, share)
    require(
        2 <= used < batch_size and share % used == 0,
        f"--norm-batch must be at least 2, less than --batch-size, and divide the {share} images "
        f"of a process; it is {used}",
    )
    if used < norm_batch and ranks.is_main:
        print(f"BatchNorm takes the {used} images of a process, not {norm_batch}.")
    return used


class ShuffledKeys:
    """Makes a step's keys: the ranks share the images of the batch in another order.

    After the step's passes, `second` holds the second view's keys, those for the queue: of the
    whole batch in its own order, float32 `[B · world_size, d]`.

    Args:
        key_pass: a view of some images to their keys, uint8 `[n, 3, H, W]` to float `[n, d]`.
        order: a permutation of the global batch, int64 `[B · world_size]` on the CPU, the same on
            every rank.
        ranks: whose shares make the global batch.
    """

    second: Tensor

    def __init__(self, key_pass: Callable[[Tensor], Tensor], order: Tensor, ranks: Ranks) -> None:
        self.key_pass = key_pass
        self.order = send(order, ranks.device)
        self.ranks = ranks

    @torch.no_grad()
    def of(self, view: Tensor, q: Tensor | None) -> Tensor:
        """Keys of a view of this rank's images, uint8 `[B, 3, H, W]`.

        Args:
            q: the view's queries; None for the second view, which has none.

        Returns:
            float32 `[B, d]` of length 1 each, without graph.
        """
        rows = self.ranks.share(len(self.order))
        shuffled = self.ranks.join_batch(view)[self.order[rows]]
        keys = self.ranks.join_batch(F.normalize(self.key_pass(shuffled).float(), dim=1))
        keys = torch.empty_like(keys).index_copy_(0, self.order, keys)
        if q is None:
            self.second = keys
        return keys[rows]
