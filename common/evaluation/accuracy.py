"""How often classifiers are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.evaluation.classifier import by_classifier

EVALUATION_BATCH = 256  # photographs at a time on each rank


@torch.no_grad()
def count_right(classifier: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """How many images each classifier has right, top-1 and top-5.

    Args:
        classifier: features `[B, d]` to scores `[B, C]`, or `[K, C, B]` of K classifiers.
        features: float32 `[N, d]`; may be empty.
        labels: int64 `[N]`.

    Returns:
        int64 `[K, 2]`.
    """
    right = 0
    # In parts: the scores of many classifiers for a whole set would fill the memory.
    for x, y in zip(features.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        scores = by_classifier(classifier(x))
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices
        hits = best == y
        right = right + torch.stack([hits[:, 0].sum(1), hits.any(1).sum(1)], dim=1)
    return right


def sweep_table(rows: Sequence[Mapping[str, float]]) -> str:
    """A sweep's accuracies, a line each base learning rate, and what its best one is."""
    lines = ["--base-lr   top-1 %   top-5 %"]
    for row in rows:
        accuracies = "  diverged"
        if "top_1" in row:
            accuracies = f"{row['top_1']:10.2f}{row['top_5']:10.2f}"
        lines.append(f"{row['base_lr']:9g}{accuracies}")
    finite = [row for row in rows if "top_1" in row]
    if finite:
        best = max(finite, key=lambda row: row["top_1"])
        lines.append(
            f"The best, {best['base_lr']:g}, is chosen on the validation set itself: its accuracy "
            "is an upper estimate, not the protocol's number."
        )
    return "\n".join(lines)
