"""Linear classifiers at twenty learning rates: trained together against one after the other.

    python benchmarks/probe_sweep.py

`test_runner.py --sweep …` against `--base-lr …` twenty times, both on cached features, checkpoints
included; the features are random and in memory before. Both ways do the same matrix products;
together, all else is done once. Small batches and few classes gain most.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from common.evaluation.classifier import new_classifier
from common.evaluation.feature_batches import cached_batches
from common.evaluation.test_runner import Config, fit
from common.runtime.memory import keep_freed_memory
from common.runtime.ranks import Ranks
from common.training.checkpoint import Checkpoints
from common.training.signals import StopFlag
from contest import Options, compare

RATES = tuple(0.01 * 1.3**step for step in range(20))
RANKS = Ranks(0, 1, torch.device("cpu"))


def contest(
    row: str, images: int, dim: int, classes: int, config: Config, options: Options
) -> None:
    """Time both ways over `images` features `[images, dim]` of `classes` classes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, dim, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    batches = cached_batches(features, labels, config, RANKS)
    stop = StopFlag(RANKS)

    def train(config: Config) -> None:
        start = new_classifier(dim, classes, config.seed)
        # A new folder each time, so that nothing is continued; progress bars are hidden.
        with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            fit(start, batches, config, {}, Checkpoints(Path(folder)), RANKS, stop)

    def one_after_the_other() -> None:
        for base_lr in RATES:
            train(replace(config, base_lr=base_lr))

    def together() -> None:
        train(replace(config, sweep=RATES))

    row = f"{row}: {images:,} x {dim}, {classes:,} classes, batch {config.batch_size}"
    contestants = {"one after the other": one_after_the_other, "together (ours)": together}
    compare(row, contestants, options, items=len(RATES) * config.epochs, unit="rate and epoch")


def main(options: Options) -> None:
    keep_freed_memory()  # as every run on a CPU does
    small = Config("", epochs=3, cache_features=True)
    contest("CIFAR-10's shape", 50_000, 512, 10, small, options)
    contest("the same", 50_000, 512, 10, replace(small, batch_size=256), options)
    # With a thousand classes the matrix products of one classifier already keep all cores busy.
    large = replace(small, epochs=1)
    contest("ImageNet's shape, small", 20_000, 2048, 1000, large, replace(options, rounds=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
