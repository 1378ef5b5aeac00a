"""kNN search: 10,000 queries in a bank of 50,000 × 512, 10 classes, k = 200.

python benchmarks/knn_search.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from common.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_predict
from common.runtime.memory import keep_freed_memory
from contest import Options, apart, compare

BANK, QUERIES, DIM, CLASSES = 50_000, 10_000, 512, 10
BLOCK = 512


def features(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Non-negative features, as a ResNet's, around one centre for each class; and labels."""
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, DIM, generator=generator)
    return (0.3 * centres[labels] + noise).relu(), labels


def one_hot_votes(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """The usual way (Wu et al., 2018, their code): all similarities, one-hot votes, a full sort."""
    bank = F.normalize(bank, dim=1).T.contiguous()
    predictions = []
    for block in F.normalize(queries, dim=1).split(BLOCK):
        weights, index = (block @ bank).topk(NEIGHBOURS, dim=1)
        one_hot = torch.zeros(len(block) * NEIGHBOURS, CLASSES)
        one_hot.scatter_(1, labels[index].view(-1, 1), 1.0)
        votes = one_hot.view(len(block), -1, CLASSES) * (weights / TEMPERATURE).exp()[..., None]
        predictions.append(votes.sum(dim=1).argsort(dim=1, descending=True)[:, 0])
    return torch.cat(predictions)


def task() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    bank, labels = features(BANK, generator)
    queries, _ = features(QUERIES, generator)
    return queries, bank, labels


def reference() -> Callable[[], Tensor]:
    return partial(one_hot_votes, *task())


def ours() -> Callable[[], Tensor]:
    keep_freed_memory()  # as every run on a CPU does
    return partial(knn_predict, *task(), CLASSES)


def main(options: Options) -> None:
    agree = reference()() == ours()()
    print(f"same predictions: {100 * agree.float().mean().item():.2f} %")
    compare(
        "kNN search, 10,000 queries in 50,000 × 512",
        {
            "blocks of 512, one-hot votes": apart(reference, options),
            "this project": apart(ours, options),
        },
        options,
        items=QUERIES,
        unit="query",
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
