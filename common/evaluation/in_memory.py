"""Evaluation of a run on images in memory: kNN while it trains, a linear classifier at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from common.augment.base import Augmentation, Draws
from common.augment.cifar10 import centre_view, normalised, probe_augmentation
from common.data.in_memory import ImageSet, Split
from common.evaluation.classifier import (
    batches_of_epoch,
    checksum,
    new_classifier,
    train_classifier,
)
from common.evaluation.features import extract_features
from common.evaluation.knn import knn_accuracy
from common.evaluation.neighbours import sample, show_neighbours
from common.runtime.errors import UserError
from common.runtime.precision import autocast
from common.runtime.ranks import Ranks, send
from common.runtime.seeding import generator_for
from common.training.checkpoint import Checkpoints
from common.training.config_json import defaults_of
from common.training.signals import StopFlag
from common.training.training import Training


@dataclass(frozen=True)
class LinearProtocol:
    """How the classifier is trained; weights start from N(0, 0.01²), the bias from 0.

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

    Continues from its own checkpoints (`train_classifier`). An epoch has whole batches only, as in
    the authors' script.

    Args:
        backbone: put in eval mode; no gradient reaches it. Its `feature_dim` is d.
        train, test: both with labels.
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
            if len(batch) < batch_size:
                return
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
        defaults=defaults_of(protocol),
        checkpoints=checkpoints,
        ranks=ranks,
        stop=stop,
        remedy="--linear-epochs 0 ends the run without it",
    )
    features = extract_features(backbone, test.images, encode_test, ranks, stop.check)
    labels = test.labels[ranks.rank :: ranks.world_size].to(ranks.device)
    with torch.no_grad():
        right = (classifier(features).argmax(dim=1) == labels).sum()
    return 100 * ranks.sum(right).item() / len(test.labels)


class Evaluation:
    """Measures the frozen backbone of a run, in eval mode; without a test set, nothing.

    Args:
        training: of the run; keeps the accuracies in its checkpoint.
        network: with a `backbone`; all ranks get rank 0's buffers.
        data: on the device; the training images are labelled where there is a test set.

    Raises:
        StopRequested: from every method, after a signal.
    """

    def __init__(self, training: Training, network: nn.Module, data: Split) -> None:
        self.training = training
        self.network = network
        self.train, self.test = data

    def encode(self, view: Tensor) -> Tensor:
        """Features `[B, feature_dim]` of a view, uint8 `[B, 3, 32, 32]` on the device."""
        with autocast(self.training.config.precision, view.device):
            return self.network.backbone(normalised(view))

    def encode_test(self, images: Tensor) -> Tensor:
        """Features of images by their centre view."""
        return self.encode(centre_view(images))

    def _knn(self) -> float:
        training = self.training
        training.ranks.broadcast_buffers(self.network)
        training.progress.knn = knn_accuracy(
            self.network.backbone,
            self.train,
            self.test,
            self.encode_test,
            training.ranks,
            training.stop.check,
        )
        return training.progress.knn

    def before_training(self) -> None:
        """kNN accuracy of the untrained network, logged as epoch 0 of a new run."""
        progress, log = self.training.progress, self.training.log
        if self.test is None or progress.epoch > 0:
            return
        progress.untrained_knn = self._knn()
        log.write(0, {"knn": progress.knn})
        log.tell(f"epoch 0 (untrained): kNN {progress.knn:.2f} %")

    def after_epoch(self, epoch: int, every: int) -> dict[str, float]:
        """kNN accuracy in percent over the whole test set, as "knn" for the epoch's row.

        The best network so far, if the epoch is whole, is kept as best.pt.

        Args:
            every: epochs between two measurements; 0: only after the last epoch.
        """
        training = self.training
        is_due = (every and epoch % every == 0) or epoch == training.last_epoch
        if self.test is None or not is_due:
            return {}
        knn = self._knn()
        if training.is_whole(epoch) and knn > (training.progress.best_knn or 0):
            training.progress.best_knn = knn
            best = {"model": self.network.state_dict(), "epoch": epoch, "knn": knn}
            training.log.save_file("best.pt", best)
        return {"knn": knn}

    def neighbours(self) -> None:
        """Show which training images the backbone finds alike; needs no labels."""
        training = self.training
        images = self.train.images[sample(len(self.train)).to(self.train.images.device)]
        training.ranks.broadcast_buffers(self.network)
        features = extract_features(
            self.network.backbone, images, self.encode_test, training.ranks, training.stop.check
        )
        show_neighbours(training, images, training.ranks.gather(features, len(images)))

    def linear(self, epochs: int) -> float | None:
        """Linear evaluation: top-1 accuracy in percent over the whole test set, logged once.

        SGD 0.9, learning rate 30, batch 256, a tenth of the rate from 60 and 80 % of the epochs on.

        Args:
            epochs: of the classifier; 0: no linear evaluation.
        """
        training = self.training
        if self.test is None or not epochs:
            return None
        done = [training.progress.steps(training.steps_per_epoch), epochs]
        accuracy = linear_accuracy(
            self.network.backbone,
            self.train,
            self.test,
            probe_augmentation(),
            self.encode,
            self.encode_test,
            LinearProtocol(epochs, batch_size=256, lr=30.0, milestones=(0.6, 0.8)),
            seed=training.config.seed,
            stamp=checksum(self.network.backbone.state_dict()),
            checkpoints=Checkpoints(
                training.log.folder,
                "linear_last.pt",
                "linear_previous.pt",
                "remove these to train a new classifier",
            ),
            ranks=training.ranks,
            stop=training.stop,
        )
        if training.progress.linear != done:  # otherwise the row is in the log already
            training.log.write(training.last_epoch, {"linear": accuracy})
            training.progress.linear = done
            if training.progress.epoch > training.last_epoch:
                try:
                    training.save(must=True)
                except UserError:  # a full disk loses the row: print it at least
                    training.log.tell(f"linear accuracy  {accuracy:.2f} %")
                    raise
        return accuracy
