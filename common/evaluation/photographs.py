"""Evaluation of a run on photographs: kNN during training, similar photographs at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from common.augment.imagenet import normalised
from common.data.decoding import shown
from common.data.listing import has_folder, renumber
from common.data.loader import Loading
from common.data.photographs import Dataset, Photograph, PhotographSet, find_photographs
from common.evaluation.feature_batches import centre_features, require_room
from common.evaluation.knn import accuracy_of_features
from common.evaluation.neighbours import CELL, sample, show_neighbours
from common.runtime.errors import UserError, require
from common.runtime.precision import autocast
from common.runtime.ranks import Ranks
from common.training.training import Training


class EvaluationConfig(Protocol):
    """The settings of the evaluation."""

    dataset: Dataset
    data_root: str
    classes: str
    image_size: int
    workers: int
    pin_memory: bool
    seed: int
    knn_every: int
    knn_images: int


class PhotographEvaluation:
    """Measures the frozen backbone of a run, in eval mode.

    kNN takes `knn_images` training photographs of each class as the bank, and all of val/. Without
    classes, without val/, or with `knn_every` 0 there is no kNN.

    Args:
        training: of the run.
        network: with a `backbone`; all ranks get rank 0's buffers.
        train: the training photographs.

    Raises:
        UserError: if val/ has classes that the training photographs do not have, not every rank
            finds a val/, or the shared memory has no room for the batches.
    """

    def __init__(
        self, training: Training, network: nn.Module, train: PhotographSet, config: EvaluationConfig
    ) -> None:
        self.training = training
        self.network = network
        self.train = train
        self.config = config
        self.val: PhotographSet | None = None
        if config.knn_every and self._has_val():
            self.val = self._find_val()
        # The batches of evaluation differ from those of training: check before it that they fit.
        # Without kNN only the first rank loads any, in `neighbours`.
        ranks = training.ranks if self.val else Ranks(0, 1, training.ranks.device)
        if training.ranks.is_main or self.val:
            require_room(train.photographs, config.image_size, self._loading(), ranks)

    def _find_val(self) -> PhotographSet | None:
        """The photographs to classify; None, and a line that says why, where labels are missing."""
        config, train, ranks = self.config, self.train, self.training.ranks
        stray = f"{shown(train.stray)} of train/"
        if train.class_names:
            source = (config.dataset, config.data_root, config.image_size, config.seed)
            val = find_photographs(*source, 1, "val", ranks, config.classes)
            if not val.stray:
                numbers = renumber(val.labels, val.class_names, train.class_names, "val/")
                self.val_labels = torch.tensor(numbers, device=ranks.device)
                return val
            stray = f"{shown(val.stray)} of val/"
        if ranks.is_main:
            print(f"No kNN: {stray} is in no class folder.")
        return None

    def _has_val(self) -> bool:
        """Whether there are photographs to classify, the same answer on every rank."""
        config = self.config
        if config.dataset != "folder":
            return True
        has_val = has_folder(Path(config.data_root), "val")
        require(
            self.training.ranks.agree(has_val),
            f"not every process finds val/ in {shown(config.data_root)}; give every machine the "
            "same files",
        )
        return has_val

    def _loading(self, skip_broken: bool = False) -> Loading:
        # Batches of 256 are large: so that it needs about as much shared memory as training.
        config = self.config
        return Loading(config.workers, 1, config.pin_memory, skip_broken)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Features float32 `[B, feature_dim]` of uint8 `[B, 3, H, W]` on the device."""
        with autocast(self.training.config.precision, images.device):
            return self.network.backbone(normalised(images)).float()

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """kNN accuracy in percent over all of val/, as "knn" for the epoch's row, if it is due."""
        every, training = self.config.knn_every, self.training
        if self.val is None or (epoch % every and epoch != training.last_epoch):
            return {}
        ranks = training.ranks
        ranks.broadcast_buffers(self.network)
        labels = torch.tensor(self.train.labels)
        chosen = first_of_each_class(labels, self.config.knn_images)
        photographs = Subset(self.train.photographs, chosen)
        bank, used = self._features(photographs, self.encode, ranks, skip_broken=True)
        bank_labels = labels[chosen][used].to(ranks.device)
        try:
            queries, _ = self._features(self.val.photographs, self.encode, ranks, skip_broken=False)
        except UserError as error:
            raise UserError(f"{error}; without kNN, --knn-every 0, the run continues") from error
        classes = len(self.train.class_names)
        training.progress.knn = accuracy_of_features(
            queries, self.val_labels, bank, bank_labels, classes, ranks
        )
        return {"knn": training.progress.knn}

    def neighbours(self) -> None:
        """Show which training photographs the backbone finds alike; needs no labels."""
        ranks = self.training.ranks
        if not ranks.is_main:
            return
        side = min(CELL, self.config.image_size)
        small: list[Tensor] = []

        def encode(images: Tensor) -> Tensor:
            # On the CPU: MPS shrinks by whole factors only.
            shrunk = F.interpolate(images.cpu().float(), (side, side), mode="area")
            small.append(shrunk.round().to(torch.uint8))
            return self.encode(images)

        index = sample(len(self.train.photographs)).tolist()
        photographs = Subset(self.train.photographs, index)
        alone = Ranks(0, 1, ranks.device)
        features, _ = self._features(photographs, encode, alone, skip_broken=True)
        show_neighbours(self.training, torch.cat(small), features)

    def _features(
        self,
        photographs: Sequence[Photograph] | Subset,
        encode: Callable[[Tensor], Tensor],
        ranks: Ranks,
        skip_broken: bool,
    ) -> tuple[Tensor, Tensor]:
        """As `centre_features`, in eval mode."""
        backbone, config = self.network.backbone, self.config
        size = (backbone.feature_dim, config.image_size)
        backbone.eval()
        try:
            return centre_features(
                photographs, encode, *size, self._loading(skip_broken), ranks, self.training.stop
            )
        finally:
            backbone.train()


def first_of_each_class(labels: Tensor, count: int) -> list[int]:
    """Indices of the first `count` images of each class, in order; labels int64 `[N]`."""
    order = labels.argsort(stable=True)
    grouped = labels[order]
    starts = torch.searchsorted(grouped, grouped)  # where each image's class begins
    place = torch.arange(len(labels)) - starts
    return order[place < count].sort().values.tolist()
