"""Linear classifiers of features, and their training."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.data.fingerprint import is_same_set
from common.runtime.errors import StopRequested, UserError, require
from common.runtime.ranks import Ranks, unwrap
from common.runtime.seeding import epoch_order, generator_for
from common.training.checkpoint import Checkpoints, restore
from common.training.config_json import differences, with_newer
from common.training.meter import Meter
from common.training.signals import StopFlag

# (epoch, first step) to (step, this rank's features `[B, d]`, labels int64 `[B]`) for the rest of
# the epoch's steps.
Batches = Callable[[int, int], Iterator[tuple[int, Tensor, Tensor]]]

CHECKPOINT_SECONDS = 600  # between checkpoints within an epoch, as a run's --checkpoint-minutes


def new_classifier(feature_dim: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear classifier with weights from N(0, 0.01²) and bias 0."""
    classifier = nn.Linear(feature_dim, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=generator_for("classifier", seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def checksum(state: Mapping[str, Tensor]) -> int:
    """A checksum of a backbone's weights, by which a checkpoint knows it again."""
    total = 0
    for value in state.values():
        total = zlib.crc32(value.cpu().contiguous().numpy().tobytes(), total)
    return total


class Classifiers(nn.Module):
    """K linear classifiers of the same features, in one matrix product.

    `weight` is float32 `[K, C, d]`, `bias` `[K, C]`.

    Args:
        start: the classifier of C classes that each of them starts as a copy of.
        count: K.
    """

    def __init__(self, start: nn.Linear, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.weight.detach().repeat(count, 1, 1))
        self.bias = nn.Parameter(start.bias.detach().repeat(count, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Scores `[K, C, B]` of features `[B, d]`.

        The images come last, since a softmax over a few adjacent classes leaves most of a
        processor's vectors empty: an eighth of the time for 10 classes on AVX-512.
        """
        weight = self.weight.flatten(0, 1)
        scores = torch.addmm(self.bias.view(-1, 1), weight, features.T)
        return scores.unflatten(0, self.bias.shape)

    def diverged(self) -> Tensor:
        """Which are no longer finite, bool `[K]`; none of them ever becomes finite again."""
        return ~(self.weight.isfinite().all(2).all(1) & self.bias.isfinite().all(1))


def by_classifier(scores: Tensor) -> Tensor:
    """Scores as `[K, C, B]`, whether of one classifier, `[B, C]`, or of `Classifiers`."""
    return scores if scores.dim() == 3 else scores.T[None]


def classifier_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Each classifier's mean cross-entropy `[K]`.

    The gradient of their sum is for each classifier that of its own loss.

    Args:
        scores: float `[B, C]` or `[K, C, B]`.
        labels: int64 `[B]`.
    """
    scores = by_classifier(scores)
    return F.cross_entropy(scores, labels.expand(len(scores), -1), reduction="none").mean(dim=1)


def batches_of_epoch(
    count: int, batch_size: int, seed: int, ranks: Ranks, epoch: int, first_step: int
) -> Iterator[tuple[int, Tensor, slice]]:
    """An epoch's batches from a step on, in the order that `epoch_order` gives `count` images.

    The last, smaller batch is cut to a multiple of the number of ranks.

    Args:
        batch_size: global, a multiple of the number of ranks.

    Yields:
        (step, the global batch's indices int64 `[B]` on the CPU, this rank's rows of it).
    """
    order = epoch_order(count, seed, epoch).split(batch_size)
    for step in range(first_step, len(order)):
        divisible = len(order[step]) // ranks.world_size * ranks.world_size
        if divisible:
            yield step, order[step][:divisible], ranks.share(divisible)


def train_classifier(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Batches,
    rate: Callable[[int], float | Tensor],
    epochs: int,
    *,
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any],
    checkpoints: Checkpoints,
    ranks: Ranks,
    stop: StopFlag,
    remedy: str,
) -> None:
    """Train by cross-entropy, from its own last checkpoint where there is one.

    Checkpoints are written after each epoch, in a long one every ten minutes, and when a signal
    comes. Of several classifiers one that diverges leaves the others as they are, and shows in
    `Classifiers.diverged`.

    Args:
        model: the classifier or `Classifiers`, in DDP under several processes.
        rate: the optimiser's learning rate in an epoch, counted from 0.
        identity: plain values, among them "backbone" and "epochs"; a checkpoint with another
            identity is not continued.
        defaults: of values in `identity` that an older version's checkpoint may lack.
        remedy: what a user can do about a loss that is not finite.

    Raises:
        StopRequested: after a checkpoint, when a signal came.
        UserError: if the loss is not finite, of several classifiers every loss; if the checkpoint
            is of this backbone, other settings and not finished; or if a signal came and the
            checkpoint cannot be written.
    """
    first_epoch = first_step = 0
    state = saved_classifier(checkpoints, identity, defaults, ranks)
    if state is not None:
        restore({"classifier": unwrap(model), "optimiser": optimiser}, state, checkpoints.last)
        first_epoch, first_step = state["epoch"], state["step"]

    def save(epoch: int, step: int, *, must: bool = False) -> None:
        if not ranks.is_main:
            return
        state = {"classifier": unwrap(model).state_dict(), "optimiser": optimiser.state_dict()}
        try:
            checkpoints.save({**state, "epoch": epoch, "step": step, "identity": dict(identity)})
        except OSError as error:
            problem = f"{checkpoints.last} cannot be written ({error}); the one before it is kept"
            if must:
                raise UserError(
                    f"{problem}: make room, then the same command continues from there"
                ) from error
            tqdm.write(f"warning: {problem}")

    def stop_at(epoch: int, step: int) -> NoReturn:
        meter.flush()
        try:
            save(epoch, step, must=True)
        finally:
            ranks.wait()
            bar.close()
        raise StopRequested(stop.exit_status)

    bar = tqdm(
        desc="linear", total=epochs, initial=first_epoch, unit="epoch", disable=not ranks.is_main
    )
    for epoch in range(first_epoch, epochs):
        optimiser.param_groups[0]["lr"] = rate(epoch)
        meter = Meter(ranks, {}, first_step, remedy)
        last_save = time.monotonic()
        for step, features, labels in batches(epoch, first_step):
            losses = classifier_losses(model(features), labels)
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            optimiser.step()
            # The mean of those that are finite; without any it is 0 / 0, which the meter refuses.
            finite = losses.isfinite()
            meter.add({"linear loss": losses.detach().where(finite, 0).sum() / finite.sum()})
            due = time.monotonic() - last_save > CHECKPOINT_SECONDS
            last_save = time.monotonic() if due else last_save
            meter.end_step({"stop": stop.requested, "checkpoint": due and ranks.is_main})
            if meter.take_request("stop"):
                stop_at(epoch, step + 1)
            if meter.take_request("checkpoint"):
                meter.flush()
                save(epoch, step + 1)
        meter.flush()
        if meter.take_request("stop"):  # on CUDA, where the last step is read only now
            stop_at(epoch + 1, 0)
        first_step = 0
        save(epoch + 1, 0)
        bar.update()
    bar.close()


def saved_classifier(
    checkpoints: Checkpoints,
    identity: Mapping[str, Any],
    defaults: Mapping[str, Any],
    ranks: Ranks,
    *,
    of_any_backbone: bool = False,
) -> dict[str, Any] | None:
    """The checkpoint that `train_classifier` would continue; None: it would start anew.

    Args:
        of_any_backbone: keep an unfinished classifier of another backbone too, where the folder
            is not of one run, whose backbone only becomes older.

    Raises:
        UserError: if the ranks find different ones, or it is of this backbone, other settings and
            not finished: it is not overwritten.
    """
    state = checkpoints.load({"identity": dict, "epoch": int, "step": int})
    require(
        ranks.agree(state and (state["identity"], state["epoch"], state["step"])),
        f"not every process finds the same {checkpoints.last}; put it on a file system that all "
        "machines share",
    )
    if state is None:
        return None
    saved = with_newer(state["identity"], identity, defaults)
    if "images" in identity and is_same_set(str(saved.get("images")), identity["images"]):
        saved["images"] = identity["images"]
    if saved == identity:
        return state
    if state["epoch"] == saved.get("epochs"):
        return None
    if saved.get("backbone") == identity["backbone"]:
        raise UserError(
            f"{checkpoints.last} holds an unfinished classifier with other settings: "
            f"{differences(saved, identity)}. Repeat its settings to continue it, or "
            f"{checkpoints.remedy}"
        )
    require(
        not of_any_backbone,
        f"{checkpoints.last} holds an unfinished classifier of other weights; choose another "
        f"--run-dir, or {checkpoints.remedy}",
    )
    return None
