"""How far a run has come: for its checkpoint, and for the person who watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tqdm import tqdm

from common.runtime.errors import UserError
from common.runtime.ranks import Ranks


@dataclass
class Progress:
    """What a checkpoint says beside weights and optimiser; plain values."""

    epoch: int = 0  # the epoch under way; 0: the evaluation before training
    step: int = 0  # steps done in it
    sums: dict[str, float] = field(default_factory=dict)  # over these steps, for the epoch's means
    images: int = 0  # in the training set
    untrained_knn: float | None = None  # percent
    knn: float | None = None  # percent, the latest
    best_knn: float | None = None
    linear: list[int] | None = None  # steps and probe epochs of the last row of linear accuracy

    def steps(self, steps_per_epoch: int) -> int:
        """Steps done since the run began."""
        return max(0, self.epoch - 1) * steps_per_epoch + self.step

    def check_images(self, count: int) -> None:
        """Refuse to go on with another data set.

        Raises:
            UserError: if the run was started with another number of images.
        """
        if count != self.images:
            raise UserError(
                f"the run was started with {self.images} training images, now there are {count}; "
                "give it the same data, or another --run-dir"
            )


class Bar:
    """One progress bar for the whole run: loss, collapse gauge, images/s and the time left."""

    def __init__(self, total: int, done: int, ranks: Ranks) -> None:
        # In a log file a line now and then, on a terminal a live one.
        interval = 0.1 if sys.stderr.isatty() else 60
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not ranks.is_main,
            mininterval=interval,
            maxinterval=max(10, interval),
            dynamic_ncols=True,
        )
        self.start_epoch()

    def start_epoch(self) -> None:
        self._started = time.monotonic()
        self._images = 0

    @property
    def images_per_second(self) -> float:
        """Global rate since the epoch's start, or since the run was continued in it."""
        return self._images / max(1e-9, time.monotonic() - self._started)

    def step(self, epoch: int, latest: Mapping[str, float], images: int) -> None:
        """Count a step of so many images and show its latest values."""
        self._images += images
        shown = [f"{name} {latest[name]:.3f}" for name in ("loss", "spread") if name in latest]
        shown.append(f"{self.images_per_second:.0f} images/s")
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
