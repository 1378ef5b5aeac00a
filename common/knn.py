"""Weighted k-nearest-neighbour classification of features (Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.datasets import ImageSet
from common.distributed import Ranks
from common.features import accuracy, extract_features

NEIGHBOURS = 200  # k
TEMPERATURE = 0.1  # τ
QUERIES = 512  # at a time; bounds the similarity matrix


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The class with most votes among the k nearest; a neighbour's vote weighs exp(cos/τ).

    Args:
        queries: `[Q, d]`, floating point, any length (normalised here).
        bank: `[N, d]`, likewise.
        bank_labels: int64 `[N]`.
        neighbours: k; the whole bank where it is smaller.
        temperature: τ.

    Returns:
        int64 `[Q]`.
    """
    queries = F.normalize(queries.float(), dim=1)
    bank = F.normalize(bank.float(), dim=1).T.contiguous()
    neighbours = min(neighbours, bank.shape[1])
    predictions = []
    for chunk in queries.split(QUERIES):
        cosine, index = (chunk @ bank).topk(neighbours, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        # All votes divided by exp(1/τ), so that no small τ overflows.
        votes.scatter_add_(1, bank_labels[index], ((cosine - 1) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet,
    encode: Callable[[Tensor], Tensor],
    ranks: Ranks,
    check: Callable[[], None],
) -> float:
    """Top-1 accuracy in percent over the whole test set, the whole training set as the bank.

    The images are shared among the ranks, each counted once.

    Args:
        encode: uint8 images `[B, 3, H, W]` on the device to features `[B, d]`.
        check: called between chunks of images; may raise to stop.
    """
    bank = extract_features(backbone, train.images, encode, ranks, check)
    bank = ranks.gather(bank, len(train))
    queries = extract_features(backbone, test.images, encode, ranks, check)
    predictions = knn_predict(queries, bank, train.labels.to(ranks.device), len(train.class_names))
    return accuracy(predictions, test.labels, ranks)
