"""common/evaluation/classifier.py against softmax regression by hand, and under real signals."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy import ndarray
from torch import Generator, Tensor, nn

from common.augment.base import Augmentation, Draws
from common.data.in_memory import ImageSet
from common.evaluation import classifier, features
from common.evaluation.in_memory import LinearProtocol, linear_accuracy
from common.runtime.errors import StopRequested, UserError
from common.runtime.ranks import Ranks
from common.training.checkpoint import Checkpoints
from common.training.signals import StopFlag

torch.set_num_threads(1)

ALONE = Ranks(0, 1, torch.device("cpu"))
TRAIN, TEST, CLASSES, DIM = 27, 17, 3, 6
BATCH, STEPS = 8, 3  # whole batches; 3 images of each epoch are left out
PROTOCOL = LinearProtocol(epochs=10, batch_size=BATCH, lr=1.0, momentum=0.9, milestones=(0.6, 0.8))
SHORT = LinearProtocol(epochs=4, batch_size=BATCH, lr=1.0, momentum=0.9, milestones=(0.6, 0.8))


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """A StopFlag takes SIGINT and SIGTERM over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Brighten(Augmentation):
    """Adds a drawn number to channels 1 and 2; channel 0 still tells which image it is."""

    columns = 1

    def draw(self, batch: int, size: tuple[int, int], generator: Generator) -> Tensor:
        assert size == (5, 4)
        return torch.randint(0, 80, (batch, 1), generator=generator).float()

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        images = images.clone()
        images[:, 1:] += draws.device.to(torch.uint8)[:, :, None, None]
        return images


def image_set(count: int, seed: int) -> ImageSet:
    """Images `[count, 3, 5, 4]` that carry their index in channel 0 and their class in the rest."""
    generator = Generator().manual_seed(seed)
    images = torch.randint(0, 100, (count, 3, 5, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images[:, 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    for image, label in zip(images, labels, strict=True):
        image[1:, label] += 60
    return ImageSet(images, labels, tuple(str(number) for number in range(CLASSES)))


class Recorder(Checkpoints):
    """Checkpoints that also keep in memory what was saved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "linear_last.pt", "linear_previous.pt")
        self.weights: list[ndarray] = []  # after each epoch, weight and bias side by side
        self.momentum: list[ndarray] = []

    def save(self, state: Mapping[str, Any]) -> None:
        super().save(state)
        self.weights.append(side_by_side(state["classifier"]))
        buffers = [row["momentum_buffer"] for row in state["optimiser"]["state"].values()]
        self.momentum.append(side_by_side(dict(zip(("weight", "bias"), buffers, strict=True))))


def side_by_side(tensors: Mapping[str, Tensor]) -> ndarray:
    return torch.cat([tensors["weight"], tensors["bias"][:, None]], dim=1).numpy().copy()


class Probe:
    """One linear evaluation of a small backbone with BatchNorm; records the batches it is given.

    Args:
        folder: of its checkpoints.
        train: the training set.
    """

    def __init__(self, folder: Path, train: ImageSet | None = None) -> None:
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, DIM, 2),
            nn.BatchNorm2d(DIM),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.backbone.feature_dim = DIM
        self.backbone(torch.rand(8, 3, 5, 4))  # moves the running averages away from their start
        self.checkpoints = Recorder(folder)
        self.train = image_set(TRAIN, seed=1) if train is None else train
        self.test = image_set(TEST, seed=2)
        self.batches: list[tuple[ndarray, ndarray]] = []  # indices and features
        self.views: list[Tensor] = []
        self.tested: list[Tensor] = []
        self.modes: set[bool] = set()
        self.before_training_batch: Callable[[], None] = lambda: None
        self.before_test_batch: Callable[[], None] = lambda: None

    def encode(self, images: Tensor) -> Tensor:
        self.modes |= {module.training for module in self.backbone.modules()}
        return self.backbone(images.float() / 255)

    def encode_train(self, views: Tensor) -> Tensor:
        self.before_training_batch()
        found = self.encode(views)
        self.views.append(views)
        self.batches.append((views[:, 0, 0, 0].numpy(), found.detach().numpy()))
        return found

    def encode_test(self, images: Tensor) -> Tensor:
        self.before_test_batch()
        self.tested.append(images)
        return self.encode(images)

    def run(self, protocol: LinearProtocol, seed: int = 0, stamp: int = 7) -> float:
        return linear_accuracy(
            self.backbone,
            self.train,
            self.test,
            Brighten(),
            self.encode_train,
            self.encode_test,
            protocol,
            seed=seed,
            stamp=stamp,
            checkpoints=self.checkpoints,
            ranks=ALONE,
            stop=StopFlag(ALONE),
        )


def starting_weights(
    folder: Path, seed: int = 0, class_names: tuple[str, ...] | None = None
) -> ndarray:
    """Those of a run whose learning rate is 0."""
    train = image_set(TRAIN, seed=1)
    probe = Probe(folder, replace(train, class_names=class_names or train.class_names))
    probe.run(LinearProtocol(1, BATCH, lr=0.0, momentum=0.9, milestones=()), seed)
    return probe.checkpoints.weights[0]


# ---------------------------------------------------------------- training


def softmax_regression(
    weights: ndarray, batches: list[tuple[ndarray, ndarray]], labels: ndarray, rates: list[float]
) -> list[ndarray]:
    """The weights, bias in the last column, after each epoch: v ← 0.9 v + g, w ← w − rate · v."""
    weights = weights.astype(numpy.float64)
    velocity = numpy.zeros_like(weights)
    trajectory = []
    for epoch, rate in enumerate(rates):
        for indices, found in batches[epoch * STEPS : (epoch + 1) * STEPS]:
            inputs = numpy.concatenate([found, numpy.ones((len(found), 1))], axis=1)
            exponentials = numpy.exp(inputs @ weights.T)
            error = exponentials / exponentials.sum(axis=1, keepdims=True)
            error[numpy.arange(len(found)), labels[indices]] -= 1
            velocity = 0.9 * velocity + error.T @ inputs / len(found)
            weights = weights - rate * velocity
        trajectory.append(weights)
    return trajectory


def test_every_epoch_equals_softmax_regression_by_hand(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    probe = Probe(tmp_path)
    probe.run(PROTOCOL)
    rates = [1.0] * 6 + [0.1] * 2 + [0.01] * 2  # a tenth from epochs 6 and 8 on, counted from 0
    expected = softmax_regression(
        starting_weights(tmp_path / "start"), probe.batches, probe.train.labels.numpy(), rates
    )
    assert len(probe.batches) == 10 * STEPS
    numpy.testing.assert_allclose(probe.checkpoints.weights, expected, rtol=0, atol=2e-5)
    # The tolerance can tell the drop's epoch: the last steps still move the weights by more.
    assert numpy.abs(expected[9] - expected[8]).max() > 2e-4


@pytest.mark.parametrize(("epochs", "drops"), [(100, (60, 80)), (5, (3, 4)), (3, (2, 3))])
def test_learning_rate_of_every_epoch(
    epochs: int, drops: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(tmp_path)
    rates = []
    really_step = torch.optim.SGD.step

    def step(optimiser: torch.optim.SGD) -> None:
        (group,) = optimiser.param_groups
        rates.append(group["lr"])
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 0, False)
        really_step(optimiser)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(probe.checkpoints, "save", lambda state: None)
    probe.run(LinearProtocol(epochs, TRAIN, lr=30.0, momentum=0.9, milestones=(0.6, 0.8)))
    first, second = drops
    expected = [30.0] * first + [3.0] * (second - first) + [0.3] * (epochs - second)
    assert rates == pytest.approx(expected, rel=1e-12)


def test_weights_start_from_a_normal_distribution_and_bias_from_0(tmp_path: Path) -> None:
    many = tuple(str(number) for number in range(400))
    samples = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        weights = starting_weights(tmp_path / str(seed), seed, many)
        assert (weights[:, DIM] == 0).all()
        sample = weights[:, :DIM]
        count = sample.size
        assert count == 400 * DIM
        assert abs(sample.mean()) < 4 * 0.01 / math.sqrt(count)
        assert abs(sample.std() - 0.01) < 4 * 0.01 / math.sqrt(2 * count)
        inner = (numpy.abs(sample) < 0.01).mean()  # 68.3 % of a normal, 57.7 % of a uniform one
        assert abs(inner - 0.683) < 4 * math.sqrt(0.683 * 0.317 / count)
        samples.append(sample)
    assert not (samples[0] == samples[1]).any()


def test_whole_batches_of_an_epoch_hold_an_image_once_in_new_order(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    probe.run(SHORT)
    assert [len(indices) for indices, _ in probe.batches] == [8, 8, 8] * 4
    orders = []
    for epoch in range(4):
        batches = probe.batches[epoch * STEPS : (epoch + 1) * STEPS]
        orders.append(numpy.concatenate([indices for indices, _ in batches]).tolist())
        assert len(set(orders[-1])) == 24
    assert len({tuple(order) for order in orders}) == 4


def test_views_are_drawn_anew_for_every_image_and_epoch(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    probe.run(SHORT)
    images = probe.train.images
    added = []
    for views in probe.views:
        difference = views.int() - images[views[:, 0, 0, 0].long()].int()
        shift = difference[:, 1, 0, 0]
        expected = torch.stack([torch.zeros_like(shift), shift, shift], dim=1)
        assert torch.equal(difference, expected[:, :, None, None].expand_as(difference))
        added += shift.tolist()
    assert len(set(added)) > 40  # 96 numbers drawn out of 80: 56 different ones expected
    assert torch.equal(images, image_set(TRAIN, seed=1).images), "the set itself was augmented"


def test_a_batch_larger_than_the_set_is_the_set(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    probe.run(LinearProtocol(2, 256, lr=1.0, momentum=0.9, milestones=(0.6, 0.8)))
    assert [sorted(indices) for indices, _ in probe.batches] == [list(range(TRAIN))] * 2


def test_the_seed_decides_alone(tmp_path: Path) -> None:
    probes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        probes.append(Probe(tmp_path / name))
        torch.manual_seed(len(probes))  # whatever the global generator has been through
        probes[-1].run(SHORT, seed)
    same, again, other = (probe.checkpoints.weights for probe in probes)
    assert numpy.array_equal(same, again)
    assert not numpy.allclose(same, other)


# ---------------------------------------------------------------- the backbone


@pytest.mark.parametrize("was_training", [True, False])
def test_the_backbone_is_frozen(was_training: bool, tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    probe.backbone.train(was_training)
    before = {name: value.clone() for name, value in probe.backbone.state_dict().items()}
    probe.run(SHORT)
    after = probe.backbone.state_dict()
    assert "1.num_batches_tracked" in after
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in probe.backbone.parameters())
    assert probe.modes == {False}
    assert not any(module.training for module in probe.backbone.modules())


# ---------------------------------------------------------------- accuracy


def test_accuracy_is_over_the_whole_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 5)  # 17 = 5 + 5 + 5 + 2
    probe = Probe(tmp_path)
    accuracy = probe.run(PROTOCOL)
    assert torch.equal(torch.cat(probe.tested), probe.test.images)
    assert [len(chunk) for chunk in probe.tested] == [5, 5, 5, 2]
    with torch.no_grad():
        found = probe.backbone.eval()(probe.test.images.float() / 255).numpy()
    weights = probe.checkpoints.weights[-1].astype(numpy.float64)
    right = 0
    for row, label in zip(found, probe.test.labels.tolist(), strict=True):
        right += int((weights[:, :DIM] @ row + weights[:, DIM]).argmax() == label)
    assert 0 < right < TEST
    assert accuracy == pytest.approx(100 * right / TEST, rel=1e-12)


# ---------------------------------------------------------------- interruption


def uninterrupted(folder: Path) -> tuple[Probe, float]:
    folder.mkdir()
    probe = Probe(folder)
    return probe, probe.run(SHORT)


def assert_same_end(probe: Probe, expected: Probe) -> None:
    """Bit for bit, the momentum too."""
    assert numpy.array_equal(probe.checkpoints.weights[-1], expected.checkpoints.weights[-1])
    assert numpy.array_equal(probe.checkpoints.momentum[-1], expected.checkpoints.momentum[-1])


# Of the 12 steps: the first, within an epoch, the last of one, the first of one, the last of all.
@pytest.mark.parametrize("step", [0, 4, 5, 6, 11])
def test_stopped_and_continued_ends_the_same(step: int, tmp_path: Path) -> None:
    expected, accuracy = uninterrupted(tmp_path / "whole")
    probe = Probe(tmp_path)

    def signal_in_this_step() -> None:
        if len(probe.batches) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    probe.before_training_batch = signal_in_this_step
    with pytest.raises(StopRequested) as raised:
        probe.run(SHORT)
    assert raised.value.exit_status == 128 + 15
    assert len(probe.batches) == step + 1, "the step under way is the last"
    assert len(probe.checkpoints.weights) == step // STEPS + 1, "after each epoch, and now"
    assert probe.tested == []

    continued = Probe(tmp_path)
    assert continued.run(SHORT) == accuracy
    assert len(continued.batches) == 12 - (step + 1), "no step is repeated"
    assert_same_end(continued, expected)


def test_stopped_twice(tmp_path: Path) -> None:
    expected, accuracy = uninterrupted(tmp_path / "whole")
    for number in (signal.SIGINT, signal.SIGTERM):
        probe = Probe(tmp_path)

        def signal_in_the_fifth_step(probe: Probe = probe, number: int = number) -> None:
            if len(probe.batches) == 4:
                os.kill(os.getpid(), number)

        probe.before_training_batch = signal_in_the_fifth_step
        with pytest.raises(StopRequested) as raised:
            probe.run(SHORT)
        assert raised.value.exit_status == 128 + number
    continued = Probe(tmp_path)
    assert continued.run(SHORT) == accuracy
    assert len(continued.batches) == 2  # each of the two interrupted runs went five steps
    assert_same_end(continued, expected)


def test_stopped_in_the_test_set_trains_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 5)
    _, accuracy = uninterrupted(tmp_path / "whole")
    probe = Probe(tmp_path)
    probe.before_test_batch = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StopRequested):
        probe.run(SHORT)
    assert len(probe.tested) == 1
    continued = Probe(tmp_path)
    assert continued.run(SHORT) == accuracy
    assert continued.batches == []


def test_a_finished_one_is_only_evaluated(tmp_path: Path) -> None:
    probe, accuracy = uninterrupted(tmp_path / "whole")
    again = Probe(tmp_path / "whole")
    assert again.run(SHORT) == accuracy
    assert again.batches == []
    assert torch.equal(torch.cat(again.tested), probe.test.images)


@pytest.mark.parametrize(("epochs", "stamp"), [(4, 8), (5, 7)])
def test_another_backbone_or_another_length_starts_anew(
    epochs: int, stamp: int, tmp_path: Path
) -> None:
    probe, _ = uninterrupted(tmp_path / "whole")
    protocol = LinearProtocol(epochs, BATCH, lr=1.0, momentum=0.9, milestones=(0.6, 0.8))
    other = Probe(tmp_path / "whole")
    other.run(protocol, stamp=stamp)
    fresh = Probe(tmp_path)
    fresh.run(protocol, stamp=stamp)
    assert len(other.batches) == epochs * STEPS
    assert_same_end(other, fresh)
    assert numpy.array_equal(other.checkpoints.weights[0], probe.checkpoints.weights[0])
    # From here on it is the new one that is continued.
    again = Probe(tmp_path / "whole")
    again.run(protocol, stamp=stamp)
    assert again.batches == []


def test_a_full_disk_costs_the_checkpoint_and_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, accuracy = uninterrupted(tmp_path / "whole")
    capsys.readouterr()
    probe = Probe(tmp_path)

    def save(state: Mapping[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(probe.checkpoints, "save", save)
    assert probe.run(SHORT) == accuracy
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 4
    assert all("linear_last.pt" in line and "No space left" in line for line in warnings)

    def signal_in_the_fifth_step() -> None:
        if len(probe.batches) == 12 + 4:
            os.kill(os.getpid(), signal.SIGTERM)

    probe.before_training_batch = signal_in_the_fifth_step
    with pytest.raises(UserError, match=r"linear_last\.pt cannot be written .*: make room, then"):
        probe.run(SHORT)
    assert len(probe.batches) == 12 + 5


def test_a_long_epoch_has_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "CHECKPOINT_SECONDS", -1)
    expected, accuracy = uninterrupted(tmp_path / "whole")
    assert len(expected.checkpoints.weights) == 12 + 4  # after each step, and each epoch
    probe = Probe(tmp_path)

    def fail_in_the_fifth_step() -> None:
        if len(probe.batches) == 4:
            raise RuntimeError("as by a kill")

    probe.before_training_batch = fail_in_the_fifth_step
    with pytest.raises(RuntimeError, match="as by a kill"):
        probe.run(SHORT)
    continued = Probe(tmp_path)
    assert continued.run(SHORT) == accuracy
    assert len(continued.batches) == 12 - 4, "no step is repeated"
    assert_same_end(continued, expected)
