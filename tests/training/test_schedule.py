"""common/training/schedule.py, every epoch, against numpy.linspace and the cosine written out."""

from __future__ import annotations

import math

import numpy
import pytest

from common.training.schedule import cosine, warmup_cosine

LR = 0.06  # 0.03 · 512 / 256


def test_every_epoch_of_the_paper() -> None:
    expected = [*numpy.linspace(0, LR, 10)[1:]]  # e = 1..9; linspace's zero, e = 0, is never used
    expected += [LR / 2 * (1 + math.cos(math.pi * (e - 10) / 790)) for e in range(10, 801)]
    rates = [warmup_cosine(epoch, 800, 10, LR) for epoch in range(1, 801)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-17)


@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_without_a_warmup_the_cosine_rules_from_the_first_epoch(warmup_epochs: int) -> None:
    rates = [warmup_cosine(epoch, 20, warmup_epochs, 1.0) for epoch in range(1, 21)]
    span = 20 - warmup_epochs
    expected = [(1 + math.cos(math.pi * (e - warmup_epochs) / span)) / 2 for e in range(1, 21)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-17)
    assert (rates[0] == 1) == (warmup_epochs == 1)
    assert rates[-1] == 0


def test_a_warmup_of_two_is_over_in_the_first_epoch() -> None:
    rates = [warmup_cosine(epoch, 4, 2, 8.0) for epoch in range(1, 5)]
    assert rates == pytest.approx([8, 8, 4, 0], abs=1e-15)  # cos 0, cos π/2, cos π


def test_a_warmup_up_to_the_last_epoch_but_one() -> None:
    rates = [warmup_cosine(epoch, 5, 4, 6.0) for epoch in range(1, 6)]
    assert rates == pytest.approx([2, 4, 6, 6, 0], abs=1e-15)


def test_imagenets_cosine_starts_at_the_peak_and_never_reaches_zero() -> None:
    rates = [cosine(epoch, 100, 0.1) for epoch in range(100)]
    expected = 0.05 * (1 + numpy.cos(numpy.pi * numpy.arange(100) / 100))
    assert rates == pytest.approx(expected.tolist(), rel=1e-12)
    assert rates[0] == 0.1
    assert rates[-1] > 0


def test_imagenets_warmup_reaches_the_peak_in_its_last_epoch() -> None:
    expected = [0.6 * e / 10 for e in range(1, 11)]
    expected += [0.3 * (1 + math.cos(math.pi * e / 90)) for e in range(90)]
    rates = [cosine(epoch, 100, 0.6, warmup_epochs=10) for epoch in range(100)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[9] == rates[10] == 0.6
