"""Evaluation of a run on CIFAR-10: weighted kNN while it trains, a linear classifier at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from common.checkpoint import Checkpoints
from common.cifar10 import centre_view, normalised, probe_augmentation
from common.datasets import ImageSet
from common.errors import UserError
from common.knn import knn_accuracy
from common.linear_probe import LinearProtocol, linear_accuracy
from common.precision import Precision, autocast
from common.progress import Progress
from common.run_log import RunLog
from common.stop import StopFlag


@dataclass(frozen=True)
class Evaluation:
    """Measures the network's frozen `backbone`, in eval mode; without a test set, nothing.

    Args:
        network: not wrapped in DDP; every rank's buffers become rank 0's.
        train: on the device, labelled where there is a test set.
        test: on the device, or None.
        seed: of the linear classifier, its order and views.
        progress: keeps the accuracies.

    Raises:
        StopRequested: while it measures, when a signal came.
    """

    network: nn.Module
    train: ImageSet
    test: ImageSet | None
    precision: Precision
    seed: int
    progress: Progress
    log: RunLog
    stop: StopFlag

    def encode(self, view: Tensor) -> Tensor:
        """Features `[B, feature_dim]` of a view, uint8 `[B, 3, 32, 32]` on the device."""
        with autocast(self.precision, view.device):
            return self.network.backbone(normalised(view))

    def encode_test(self, images: Tensor) -> Tensor:
        """Features of images by their centre view."""
        return self.encode(centre_view(images))

    def _knn(self, test: ImageSet) -> float:
        ranks = self.log.ranks
        ranks.broadcast_buffers(self.network)
        self.progress.knn = knn_accuracy(
            self.network.backbone, self.train, test, self.encode_test, ranks, self.stop.check
        )
        return self.progress.knn

    def before_training(self) -> None:
        """kNN accuracy of the untrained network, logged as epoch 0."""
        if self.test is None:
            return
        self.progress.untrained_knn = self._knn(self.test)
        self.log.write(0, {"knn": self.progress.knn})
        self.log.tell(f"epoch 0 (untrained): kNN {self.progress.knn:.2f} %")

    def after_epoch(self, epoch: int, *, is_whole: bool) -> dict[str, float]:
        """kNN accuracy in percent over the whole test set, as "knn" for the epoch's row.

        Args:
            is_whole: whether the epoch is; a best network after one is kept as best.pt.
        """
        if self.test is None:
            return {}
        knn = self._knn(self.test)
        if is_whole and knn > (self.progress.best_knn or 0):
            self.progress.best_knn = knn
            best = {"model": self.network.state_dict(), "epoch": epoch, "knn": knn}
            self.log.save_file("best.pt", best)
        return {"knn": knn}

    def linear(
        self, epochs: int, last_epoch: int, steps_per_epoch: int, save: Callable[..., None]
    ) -> float | None:
        """Linear evaluation: top-1 accuracy in percent over the whole test set, logged once.

        SGD 0.9, rate 30, batch 256, a tenth of the rate from 60 and 80 % of the epochs on.

        Args:
            epochs: of the classifier; 0: no linear evaluation.
            last_epoch: of pretraining, where the accuracy is logged.
            steps_per_epoch: of pretraining; the steps done identify the backbone.
            save: writes the run's checkpoint, `must=True`, so that the row is kept.
        """
        if self.test is None or not epochs:
            return None
        done = [self.progress.steps(steps_per_epoch), epochs]
        accuracy = linear_accuracy(
            self.network.backbone,
            self.train,
            self.test,
            probe_augmentation(),
            self.encode,
            self.encode_test,
            LinearProtocol(epochs, batch_size=256, lr=30.0, milestones=(0.6, 0.8)),
            seed=self.seed,
            stamp=done[0],
            checkpoints=Checkpoints(
                self.log.folder,
                "linear_last.pt",
                "linear_previous.pt",
                "remove these to train anew",
            ),
            ranks=self.log.ranks,
            stop=self.stop,
        )
        if self.progress.linear != done:  # otherwise the row stands in the log already
            self.log.write(last_epoch, {"linear": accuracy})
            self.progress.linear = done
            if self.progress.epoch > last_epoch:
                try:
                    save(must=True)
                except UserError:  # a full disk takes the row with it: here it stands at least
                    self.log.tell(f"linear accuracy  {accuracy:.2f} %")
                    raise
        return accuracy
