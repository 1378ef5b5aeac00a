"""NT-Xent and InfoNCE against loops over single numbers in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from numpy import ndarray
from torch import Tensor

import mocov2_imagenet.loss
import simclr_cifar10.loss
import simclr_imagenet.loss
from common.losses import contrastive
from common.runtime.ranks import Ranks

TEMPERATURE = 0.5
SETTINGS = {"temperature": TEMPERATURE, "ranks": Ranks(0, 1, torch.device("cpu"))}
QUEUE = numpy.random.default_rng(7).normal(size=(6, 4))
QUEUE /= numpy.sqrt((QUEUE**2).sum(axis=1, keepdims=True))
nt_xent = partial(contrastive.nt_xent, **SETTINGS)
info_nce = partial(contrastive.info_nce, **SETTINGS)
with_queue = partial(
    contrastive.info_nce_with_queue,
    queue=torch.tensor(QUEUE, dtype=torch.float32),
    temperature=TEMPERATURE,
)
LOSSES = [nt_xent, info_nce, with_queue]


def cosine(a: ndarray, b: ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


def nt_xent_by_hand(first: ndarray, second: ndarray, temperature: float = TEMPERATURE) -> float:
    batch = len(first)
    z = [*first, *second]
    total = 0.0
    for anchor in range(2 * batch):
        partner = (anchor + batch) % (2 * batch)
        others = [index for index in range(2 * batch) if index != anchor]
        sums = sum(math.exp(cosine(z[anchor], z[other]) / temperature) for other in others)
        total -= math.log(math.exp(cosine(z[anchor], z[partner]) / temperature) / sums)
    return total / (2 * batch)


def info_nce_by_hand(q: ndarray, k: ndarray, temperature: float = TEMPERATURE) -> float:
    total = 0.0
    for index in range(len(q)):
        sums = sum(math.exp(cosine(q[index], other) / temperature) for other in k)
        total -= math.log(math.exp(cosine(q[index], k[index]) / temperature) / sums)
    return total / len(q)


def with_queue_by_hand(q: ndarray, k: ndarray, temperature: float = TEMPERATURE) -> float:
    total = 0.0
    for query, key in zip(q, k, strict=True):
        positive = math.exp(cosine(query, key) / temperature)
        negatives = sum(math.exp(cosine(query, other) / temperature) for other in QUEUE)
        total -= math.log(positive / (positive + negatives))
    return total / len(q)


BY_HAND = [
    (nt_xent, nt_xent_by_hand),
    (info_nce, info_nce_by_hand),
    (with_queue, with_queue_by_hand),
]


def batch(count: int = 5, seed: int = 0) -> tuple[ndarray, ndarray]:
    random = numpy.random.default_rng(seed)
    return random.normal(size=(count, 4)), random.normal(size=(count, 4))


def leaves(*arrays: ndarray) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in arrays]


def test_values_that_the_eye_can_check() -> None:
    """Images at right angles, both views alike, τ = ½: cos/τ is 2 for the positive, else 0."""
    z = torch.eye(2)
    # each of four anchors: e² against e² + 1 + 1, itself left out
    assert nt_xent(z, z).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)
    # each of two anchors: e² against e² + 1, the positive counted in
    assert info_nce(z, z).item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    # views of the same image opposite, the two images too: −2 against −2, and against 2, −2, −2
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    expected = math.log((math.exp(2) + 2 * math.exp(-2)) / math.exp(-2))
    assert nt_xent(z, -z).item() == pytest.approx(expected, rel=1e-6)
    assert info_nce(z, -z).item() == pytest.approx(math.log(1 + math.exp(4)), rel=1e-6)


@pytest.mark.parametrize(("ours", "by_hand"), BY_HAND)
@pytest.mark.parametrize("count", [2, 5, 16])
def test_values_by_loops(
    ours: Callable[..., Tensor], by_hand: Callable[..., float], count: int
) -> None:
    first, second = batch(count)
    for temperature in (0.5, 0.2):
        value = ours(*leaves(first, second), temperature=temperature)
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert value.item() == pytest.approx(by_hand(first, second, temperature), rel=1e-5)


@pytest.mark.parametrize(("ours", "by_hand"), BY_HAND)
def test_gradients_by_differences(
    ours: Callable[..., Tensor], by_hand: Callable[..., float]
) -> None:
    """Of every coordinate; both of NT-Xent's views get one, of InfoNCE's the queries alone."""
    first, second = batch()
    z_1, z_2 = leaves(first, second)
    ours(z_1, z_2).backward()

    def slopes(moved: ndarray) -> ndarray:
        result = numpy.zeros_like(moved)
        for position in numpy.ndindex(moved.shape):
            values = []
            for change in (1e-5, -2e-5):
                moved[position] += change
                values.append(by_hand(first, second))
            moved[position] += 1e-5
            result[position] = (values[0] - values[1]) / 2e-5
        return result

    numpy.testing.assert_allclose(z_1.grad.numpy(), slopes(first), rtol=0, atol=1e-6)
    if ours is nt_xent:
        numpy.testing.assert_allclose(z_2.grad.numpy(), slopes(second), rtol=0, atol=1e-6)
    else:
        assert z_2.grad is None


@pytest.mark.parametrize("ours", [nt_xent, info_nce])
def test_one_image_has_nothing_to_be_told_from(ours: Callable[..., Tensor]) -> None:
    """Its positive is the whole sum, so that the loss is 0 and moves nothing."""
    z_1, z_2 = leaves(*batch(1))
    value = ours(z_1, z_2)
    value.backward()
    assert value.item() == 0
    assert (z_1.grad == 0).all()


def test_no_gradient_reaches_the_queue() -> None:
    q, k, queue = leaves(*batch(), QUEUE)
    with_queue(q, k, queue=queue).backward()
    assert k.grad is None
    assert queue.grad is None


def test_the_experiments_weigh_a_pair_by_a_half() -> None:
    q, k = leaves(*batch())
    for experiment in (simclr_cifar10, simclr_imagenet):
        assert experiment.loss.pair_loss(q, k, **SETTINGS) == 0.5 * info_nce(q, k)
    settings = with_queue.keywords
    assert mocov2_imagenet.loss.pair_loss(q, k, **settings) == 0.5 * with_queue(q, k)


@pytest.mark.parametrize("ours", LOSSES)
def test_lengths_do_not_count(ours: Callable[..., Tensor]) -> None:
    z_1, z_2 = leaves(*batch())
    value = ours(z_1, z_2)
    # powers of two, so that rounding is the same
    lengths = torch.tensor([[0.25], [1.0], [2.0], [64.0], [1024.0]])
    assert ours(lengths * z_1, lengths.flip(0) * z_2) == value
    value.backward()
    along = (z_1.grad * z_1).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(5), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("ours", "by_hand"), BY_HAND)
def test_fp32_from_bf16_and_under_autocast(
    ours: Callable[..., Tensor], by_hand: Callable[..., float]
) -> None:
    z_1, z_2 = (z.detach().bfloat16() for z in leaves(*batch()))
    expected = by_hand(z_1.double().numpy(), z_2.double().numpy())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ours(z_1, z_2)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)
