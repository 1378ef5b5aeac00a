"""Evaluation of a run on images in memory: kNN while it trains, a linear classifier at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from common.augment.base import Augmentation, Draws
from common.augment.cifar10 import centre_view, normalised, probe_augmentation
from common.data.in_memory import ImageSet
from common.evaluation.classifier import batches_of_epoch, new_classifier, train_classifier
from common.evaluation.features import accuracy, extract_features
from common.evaluation.knn import knn_accuracy
from common.runtime.errors import UserError
from common.runtime.precision import Precision, autocast
from common.runtime.ranks import Ranks, send
from common.runtime.seeding import generator_for
from common.training.checkpoint import Checkpoints
from common.training.progress import Progress
from common.training.run_folder import RunLog
from common.training.signals import StopFlag


@dataclass(frozen=True)
class LinearProtocol:
    """How the classifier is trained; weights start from N(0, 0.01), the bias from 0.

    Plain SGD with momentum; the learning rate falls to a tenth from each milestone on.
    """

    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...]  # as shares of the epochs
    momentum: float = 0.9


def linear_accuracy(
    backbone: nn.Module,
    train: ImageSet,
    test: ImageSet,
    augmentation: Augmentation,
    encode_train: Callable[[Tensor], Tensor],
    encode_test: Callable[[Tensor], Tensor],
    protocol: LinearProtocol,
    *,
    seed: int,
    stamp: int,
    checkpoints: Checkpoints,
    ranks: Ranks,
    stop: StopFlag,
) -> float:
    """Train a classifier on the frozen backbone; top-1 accuracy in percent over the whole test set.

    Continues from its own checkpoints, written after each epoch and when a signal comes.

    Args:
        backbone: put in eval mode; no gradient reaches it. Its `feature_dim` is d.
        augmentation: of training images.
        encode_train, encode_test: uint8 images on the device to features `[B, d]`.
        stamp: identifies the backbone; a checkpoint of another backbone or protocol is not
            continued.

    Raises:
        StopRequested: after a checkpoint, when a signal came.
    """
    batch_size = min(protocol.batch_size, len(train))
    batch_size -= batch_size % ranks.world_size
    size = (train.images.shape[2], train.images.shape[3])
    backbone.eval()

    def batches(epoch: int, first_step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, batch, rows in batches_of_epoch(
            len(train), batch_size, seed, ranks, epoch, first_step
        ):
            draws = augmentation.draw(len(batch), size, generator_for("linear", seed, epoch, step))
            index = send(batch[rows], ranks.device)
            with torch.no_grad():
                views = augmentation.apply(train.images[index], Draws.of(draws[rows], ranks.device))
                features = encode_train(views).float()
            yield step, features, train.labels[index]

    def rate(epoch: int) -> float:
        passed = sum(epoch >= share * protocol.epochs for share in protocol.milestones)
        return protocol.lr * 0.1**passed

    classifier = new_classifier(backbone.feature_dim, len(train.class_names), seed)
    model = ranks.wrap(classifier)
    train_classifier(
        model,
        torch.optim.SGD(model.parameters(), lr=protocol.lr, momentum=protocol.momentum),
        batches,
        rate,
        protocol.epochs,
        identity={"backbone": stamp, **asdict(protocol)},
        checkpoints=checkpoints,
        ranks=ranks,
        stop=stop,
        way_out="--linear-epochs 0 ends the run without it",
    )
    features = extract_features(backbone, test.images, encode_test, ranks, stop.check)
    with torch.no_grad():
        predictions = classifier(features).argmax(dim=1)
    return accuracy(predictions, test.labels, ranks)


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
