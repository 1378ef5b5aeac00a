"""Barlow Twins' loss against loops over single numbers in float64, and on two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from barlowtwins_imagenet.loss import pair_loss
from common.losses.cross_correlation import cross_correlation_loss
from common.runtime.ranks import Ranks
from processes import on_two_ranks

WEIGHT = 0.0051
ONE = Ranks(0, 1, torch.device("cpu"))


def loss(z_1: Tensor, z_2: Tensor, weight: float = WEIGHT) -> Tensor:
    return cross_correlation_loss(z_1, z_2, weight, ONE)


def by_hand(first: ndarray, second: ndarray, weight: float = WEIGHT) -> float:
    """Equation 1, number by number."""

    def standardised(z: ndarray) -> list[list[float]]:
        columns = []
        for column in z.T.tolist():
            mean = sum(column) / len(column)
            variance = sum((value - mean) ** 2 for value in column) / len(column)
            columns.append([(value - mean) / math.sqrt(variance + 1e-5) for value in column])
        return columns

    columns_1, columns_2 = standardised(first), standardised(second)
    total = 0.0
    for i, a in enumerate(columns_1):
        for j, b in enumerate(columns_2):
            c = sum(x * y for x, y in zip(a, b, strict=True)) / len(first)
            total += (1 - c) ** 2 if i == j else weight * c**2
    return total


def batch(images: int, dimensions: int, seed: int = 0) -> tuple[ndarray, ndarray]:
    """Two views' projections that agree in part, dimensions of different means and sizes."""
    random = numpy.random.default_rng(seed)
    sizes, means = random.uniform(0.5, 2, dimensions), random.normal(size=dimensions)
    shared = random.normal(size=(images, dimensions))
    first, second = (shared + random.normal(size=shared.shape) for _ in range(2))
    return first * sizes + means, second


def leaves(*arrays: ndarray) -> list[Tensor]:
    return [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in arrays]


def test_values_that_the_eye_can_check() -> None:
    # Three dimensions at right angles, each of ±1: C is the identity but for BatchNorm's epsilon.
    z = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).float()
    assert loss(z, z).item() == pytest.approx(0, abs=1e-8)
    # Dimensions exchanged: 0 on two places of the diagonal, 1 on two places beside it.
    assert loss(z, z[:, [1, 0, 2]], 0.25).item() == pytest.approx(2 + 2 * 0.25, rel=1e-4)
    # A collapsed view: C is 0.
    assert loss(z, torch.ones(4, 3)).item() == 3


@pytest.mark.parametrize(("images", "dimensions"), [(2, 5), (16, 7), (5, 40)])
@pytest.mark.parametrize("weight", [WEIGHT, 2.0])
def test_values_by_loops(images: int, dimensions: int, weight: float) -> None:
    """More images than dimensions and fewer."""
    first, second = batch(images, dimensions)
    value = loss(*leaves(first, second), weight)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(by_hand(first, second, weight), rel=1e-5)


@pytest.mark.parametrize(("images", "dimensions"), [(16, 4), (4, 9)])
def test_gradients_by_differences(images: int, dimensions: int) -> None:
    """Of every coordinate of both views; of L_A half of it, and none to the target."""
    first, second = batch(images, dimensions)

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

    z_1, z_2 = leaves(first, second)
    loss(z_1, z_2).backward()
    numpy.testing.assert_allclose(z_1.grad.numpy(), slopes(first), rtol=1e-4, atol=1e-5)
    numpy.testing.assert_allclose(z_2.grad.numpy(), slopes(second), rtol=1e-4, atol=1e-5)

    p, target = leaves(first, second)
    value = pair_loss(p, target, WEIGHT, ONE)
    value.backward()
    assert value.item() == pytest.approx(0.5 * by_hand(first, second), rel=1e-5)
    assert torch.equal(p.grad, 0.5 * z_1.grad)
    assert target.grad is None


def test_fp32_from_bf16_and_under_autocast() -> None:
    z_1, z_2 = (z.detach().bfloat16() for z in leaves(*batch(16, 7)))
    expected = by_hand(z_1.double().numpy(), z_2.double().numpy())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z_1, z_2)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else [result]:
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return result


def test_the_correlation_matrix_is_never_made() -> None:
    """Forward and backward, 8 images of 512 dimensions: nothing is larger than a projection."""
    z_1, z_2 = leaves(*batch(8, 512))
    with Largest() as largest:
        loss(z_1, z_2).backward()
    assert largest.elements == 8 * 512


class Projector(nn.Module):
    """Without BatchNorm, so that a rank's outputs are those of the joined batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def step(model: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """Losses and gradients of L_S and of L_A, of this rank's share of twelve images."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(12, 6, generator=generator)[ranks.share(12)] for _ in range(2)]
    result = {}
    for name, function in (("symmetric", cross_correlation_loss), ("asymmetric", pair_loss)):
        model.zero_grad()
        value = function(model(views[0]), model(views[1]), WEIGHT, ranks)
        value.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        result[name] = (value.detach(), gradients)
    return result


def on_a_rank(ranks: Ranks) -> dict[str, Any]:
    return step(ranks.wrap(Projector()), ranks)


def test_two_ranks_have_the_loss_and_the_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    """A mean over the ranks of their own correlations, or a plain all_reduce, gives others."""
    first, second = on_two_ranks(on_a_rank, tmp_path)
    for name, (value, gradients) in step(Projector(), ONE).items():
        for result in (first, second):
            torch.testing.assert_close(result[name][0], value, rtol=1e-5, atol=0)
            for ours, theirs in zip(result[name][1], gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
