"""The bookkeeping of a run's steps: continuing, counting, logging, checkpoints, stop requests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol

from torch import nn

from common.data.batches import Batch, Batches
from common.dssl import Part
from common.runtime.errors import StopRequested, require
from common.runtime.precision import Precision, shared_casts
from common.runtime.ranks import Ranks
from common.training.checkpoint import Stateful, restore
from common.training.meter import Meter, require_finite
from common.training.picture import PICTURED, picture_views
from common.training.progress import Bar, Progress
from common.training.run_folder import RunLog
from common.training.signals import StopFlag
from common.views import Regime, ViewMaker

EVALUATED_UNSAVED = 60  # seconds of training that an evaluation may lose


class RunConfig(Protocol):
    """The settings that every training script has."""

    dataset: str
    data_root: str
    regime: Regime
    epochs: int
    batch_size: int
    max_steps: int
    checkpoint_minutes: float
    seed: int
    device: str
    precision: Precision
    compile: bool
    run_dir: str
    fresh: bool


class Training:
    """Everything around a run's steps that does not depend on the method.

        with run.training(parts, batches, view_maker) as training:
            for epoch in training.epochs():
                training.set_lr(...)
                for batch in training.steps(epoch):
                    ...
                    training.add(part)
        training.finish()

    A stop request ends the `with` after a checkpoint. Arguments as in `Run.training`.

    Raises:
        UserError: if the network has no backbone of known `feature_dim`, the checkpoint is of other
            images, or the folder cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        log: RunLog,
        saved: Mapping[str, Any] | None,
        parts: Mapping[str, Stateful],
        batches: Batches,
        view_maker: ViewMaker,
    ) -> None:
        require(
            hasattr(getattr(parts["model"], "backbone", None), "feature_dim"),
            "the network needs `backbone`, which maps images to features `[B, d]`, with "
            "`backbone.feature_dim` = d: kNN, linear evaluation and backbone.pt use it",
        )
        self.config = config
        self.ranks = ranks
        self.log = log
        self.parts = parts
        self.batches = batches
        self.steps_per_epoch = len(batches) // config.batch_size
        self.last_step = config.epochs * self.steps_per_epoch
        if config.max_steps:
            self.last_step = min(self.last_step, config.max_steps)
        self.last_epoch = -(-self.last_step // self.steps_per_epoch)
        self.row: dict[str, float] = {}  # of metrics.jsonl, for the epoch that has just ended

        self.progress = Progress()
        if saved is not None:
            self.progress = Progress.of(saved["progress"])
            self.progress.check_images(len(batches), batches.fingerprint)
            restore(parts, saved, log.checkpoints.last)
        self.progress.images, self.progress.fingerprint = len(batches), batches.fingerprint
        log.open(self.progress.epoch)
        self.meter = Meter(ranks, self.progress.sums, self.progress.step)
        if self.progress.epoch == 0 and ranks.is_main:
            shown, batch = batches.examples(PICTURED)
            log.picture("views", picture_views(shown, view_maker.views(batch)), 0)
        if config.compile:  # after the picture: its few images would be compiled for separately
            view_maker.compile()
        self.stop = StopFlag(ranks)
        self.bar = Bar(self.last_step, self.progress.steps(self.steps_per_epoch), ranks)

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if isinstance(error, StopRequested):
                self.save(must=True)
                self.ranks.wait()  # torchrun ends the other processes as soon as one has ended
        finally:
            self.bar.close()
        if error is None:
            network = self.parts["model"]
            self.ranks.broadcast_buffers(network)
            self.log.save_file("backbone.pt", network.backbone.state_dict(), must=True)

    def epochs(self) -> Iterator[int]:
        """The epochs still to do, counted from 1; each one's row is logged as it ends.

        Raises:
            UserError: if the last checkpoint cannot be written, or a weight is not finite.
        """
        if self.progress.epoch == 0:
            self.progress.epoch = 1
            self.save()
        for epoch in range(self.progress.epoch, self.last_epoch + 1):
            yield epoch
            self.log.write(epoch, self.row)
            self.log.tell_epoch(epoch, self.last_epoch, self.row)
            if self.is_whole(epoch):
                self.progress.epoch, self.meter = epoch + 1, Meter(self.ranks, {}, 0)
                self.save(must=epoch == self.last_epoch)

    def steps(self, epoch: int) -> Iterator[Batch]:
        """The batches of the epoch's steps still to do; checkpoints are written between them.

        Raises:
            StopRequested: after a step, when a signal came or an image file was broken.
            UserError: if a loss or, at the end, a weight is not finite.
        """
        self.bar.start_epoch()
        last_save = time.monotonic()
        batches = self.batches.epoch(epoch, self.meter.steps, self.steps_in(epoch))
        with closing(batches):  # at a stop it tells which files were skipped
            for batch in batches:
                with shared_casts(self.ranks.device):
                    yield batch
                if self.batches.must_stop:
                    self.stop.fail()
                due = time.monotonic() - last_save > 60 * self.config.checkpoint_minutes
                last_save = time.monotonic() if due else last_save
                self.meter.end_step(
                    {"stop": self.stop.requested, "checkpoint": due and self.ranks.is_main}
                )
                knn = {} if self.progress.knn is None else {"knn": self.progress.knn}
                self.bar.step(epoch, {**self.meter.latest, **knn}, self.config.batch_size)
                if self.meter.take_request("stop"):
                    raise StopRequested(self.stop.exit_status)
                if self.meter.take_request("checkpoint"):
                    self.save()
        self.meter.flush()
        if self.meter.take_request("stop"):  # on CUDA, where the last step is read only now
            raise StopRequested(self.stop.exit_status)
        require_finite(self.parts["model"])
        self.row = {**self.meter.means(), "lr": self.lr}
        if self.bar.images_per_second:  # none where a stop came in the evaluation of the epoch
            self.row["images_per_second"] = self.bar.images_per_second
        if not self.is_whole(epoch):
            self.save(must=True)  # --max-steps ends within the epoch; a higher one continues here
        elif self.ranks.any(time.monotonic() - last_save > EVALUATED_UNSAVED):
            self.save()  # an error in the evaluation does not lose the steps

    def steps_in(self, epoch: int) -> int:
        """How many steps an epoch has: fewer than others where `--max-steps` ends within it."""
        return min(self.steps_per_epoch, self.last_step - (epoch - 1) * self.steps_per_epoch)

    def is_whole(self, epoch: int) -> bool:
        """Whether the epoch runs to its end."""
        return self.steps_in(epoch) == self.steps_per_epoch

    def set_lr(self, lr: float) -> None:
        """Set the epoch's learning rate; a group of parameters with an "lr_scale" multiplies it."""
        self.lr = lr
        for group in self.parts["optimiser"].param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def add(self, part: Part) -> None:
        """Add a part of the step's loss to the epoch's means, after its backward pass."""
        self.meter.add({"loss": part.loss.detach(), **part.log})

    def save(self, *, must: bool = False) -> None:
        """Write a checkpoint; arguments as in `RunLog.save`.

        Raises:
            UserError: if a loss or a weight is not finite: the checkpoint before it is kept.
        """
        self.meter.flush()
        require_finite(self.parts["model"])
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                self.ranks.broadcast_buffers(part)
        self.progress.step, self.progress.sums = self.meter.steps, self.meter.sums
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.log.save({**state, "progress": asdict(self.progress)}, must=must)

    def finish(self, linear: float | None = None) -> None:
        """Print the result and close the log.

        Args:
            linear: accuracy of the linear evaluation in percent, if there was one.
        """
        self.log.tell_result(self.progress, linear)
        self.log.close()
