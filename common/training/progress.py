"""How far a run has come: in its checkpoint, and on the screen."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tqdm import tqdm

from common.data.fingerprint import is_same_set
from common.runtime.errors import UserError, require
from common.runtime.ranks import Ranks


@dataclass
class Progress:
    """What a checkpoint holds besides weights and optimiser; plain values."""

    epoch: int = 0  # the present one, counted from 1; 0: the evaluation before training
    step: int = 0  # steps done in it
    sums: dict[str, float] = field(default_factory=dict)  # over these steps, for the epoch's means
    images: int = 0  # in the training set
    untrained_knn: float | None = None  # percent
    knn: float | None = None  # percent, the latest
    best_knn: float | None = None
    linear: list[int] | None = None  # steps and probe epochs of the last row of linear accuracy
    fingerprint: str = ""  # of the training images

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """The progress in a checkpoint; values that an older version did not write are the default.

        Raises:
            UserError: if the values are another version's.
        """
        kinds = {"epoch": int, "step": int, "images": int, "fingerprint": str, "sums": dict}
        names = {one.name for one in fields(cls)}
        wrong = [
            str(name)
            for name, value in saved.items()
            if name not in names or not isinstance(value, kinds.get(name, object))
        ]
        require(
            not wrong,
            f"the checkpoint's progress has values that this version cannot use: "
            f"{', '.join(wrong)}; continue with the version of the code that wrote it",
        )
        return cls(**saved)

    def steps(self, steps_per_epoch: int) -> int:
        """Steps since the start of the run."""
        return max(0, self.epoch - 1) * steps_per_epoch + self.step

    def check_images(self, count: int, fingerprint: str) -> None:
        """Refuse to continue with another data set.

        Raises:
            UserError: if the run was started with another number of images, or with other ones.
        """
        if count != self.images:
            raise UserError(
                f"the run was started with {self.images} training images, now there are {count}; "
                "give it the same data, or another --run-dir"
            )
        if not is_same_set(self.fingerprint, fingerprint):
            raise UserError(
                f"the run was started with other training images ({self.fingerprint}), now there "
                f"are {fingerprint}: files were renamed or replaced; give it the same data, or "
                "another --run-dir"
            )


class Bar:
    """One progress bar for the whole run: loss, spread of z, images/s and the time left.

    Args:
        total: steps of the run.
        done: how many of them were done before.
        ranks: this process's place; only rank 0 shows the bar.
    """

    def __init__(self, total: int, done: int, ranks: Ranks) -> None:
        # Seconds between two updates; in a log file each one adds a line.
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
        """Measure images/s from here on."""
        self._started = time.monotonic()
        self._images = 0

    @property
    def images_per_second(self) -> float:
        """Of all ranks, since the start of the epoch, or since the run was continued in it."""
        return self._images / max(1e-9, time.monotonic() - self._started)

    def step(self, epoch: int, latest: Mapping[str, float], images: int) -> None:
        """Count a step of `images` images, and show the latest values by name."""
        self._images += images
        shown = [f"{name} {latest[name]:.3f}" for name in ("loss", "spread") if name in latest]
        shown += [f"kNN {latest['knn']:.1f} %"] if "knn" in latest else []
        shown.append(f"{self.images_per_second:.0f} images/s")
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()
