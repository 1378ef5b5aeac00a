"""Weighted k-nearest-neighbour classification of features (Wu et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.in_memory import ImageSet
from common.evaluation.features import extract_features
from common.runtime.ranks import Ranks

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
    ranks: Ranks | None = None,
) -> Tensor:
    """The class with most votes among the k nearest; a neighbour's vote weighs exp(cos/τ).

    The bank may be spread over ranks: each finds its own k nearest, the best of these count.

    Args:
        queries: `[Q, d]`, floating point, of any norm (normalised here); the same on every rank.
        bank: `[N, d]`, likewise; this rank's share.
        bank_labels: int64 `[N]`, of that share.
        neighbours: k; the whole bank where it is smaller.
        temperature: τ.
        ranks: over which the bank is spread; None where it is whole.

    Returns:
        int64 `[Q]`, the same on every rank.
    """
    queries = F.normalize(queries.float(), dim=1)
    # Normalised and transposed in one copy: the bank may be of many gigabytes.
    columns = bank.new_empty(bank.shape[::-1], dtype=torch.float32)
    F.normalize(bank.float(), dim=1, out=columns.T)
    here = min(neighbours, len(bank))
    # Filled in place: small tensors kept from each chunk would cut up the memory that it frees.
    predictions = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for chunk, predicted in zip(queries.split(QUERIES), predictions.split(QUERIES), strict=True):
        cosine, index = (chunk @ columns).topk(here, dim=1)
        labels = bank_labels[index]
        if ranks is not None and ranks.world_size > 1:
            # A rank that has fewer than k adds neighbours at −∞, whose votes weigh nothing.
            cosine = ranks.join(F.pad(cosine, (0, neighbours - here), value=-torch.inf))
            labels = ranks.join(F.pad(labels, (0, neighbours - here)))
            cosine, best = cosine.topk(neighbours, dim=1)
            labels = labels.gather(1, best)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        # All votes divided by exp(1/τ), so that no small τ overflows.
        votes.scatter_add_(1, labels, ((cosine - 1) / temperature).exp())
        torch.argmax(votes, dim=1, out=predicted)
    return predictions


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
        train, test: both with labels.
        encode: uint8 images `[B, 3, H, W]` on the device to features `[B, d]`.
        check: called between chunks of images; may raise to stop.
    """
    bank = extract_features(backbone, train.images, encode, ranks, check)
    bank_labels = train.labels[ranks.rank :: ranks.world_size].to(ranks.device)
    queries = extract_features(backbone, test.images, encode, ranks, check)
    labels = test.labels.to(ranks.device)
    return accuracy_of_features(queries, labels, bank, bank_labels, len(train.class_names), ranks)


def accuracy_of_features(
    queries: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    ranks: Ranks,
) -> float:
    """Top-1 accuracy in percent of features that are spread over the ranks.

    Args:
        queries: `[n, d]`, this rank's share: features rank, rank + world_size, …
        labels: int64 `[N]`, of the whole set of queries.
        bank, bank_labels: this rank's share of the bank, `[m, d]` and int64 `[m]`.
    """
    queries = ranks.gather(queries, len(labels))
    predictions = knn_predict(queries, bank, bank_labels, num_classes, ranks=ranks)
    return 100 * (predictions == labels).sum().item() / len(labels)
