"""LARC against the method's formula in NumPy float64 and against torch.optim.SGD."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy
import pytest
import torch
from torch import Tensor, nn

from assertions import seeded
from common.training.larc import LARC

SHAPES = ((5, 7), (5,), (2, 3, 3, 3))


def random_tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = seeded(seed)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def parameters(values: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(value.clone()) for value in values]


def step(optimiser: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimiser.step()


def by_hand(
    values: Sequence[Tensor],
    grads_of_steps: Sequence[Sequence[Tensor]],
    rates: Sequence[float],
    momentum: float,
    weight_decay: float,
    trust: float = 0.001,
) -> list[numpy.ndarray]:
    """The parameters after one step for each learning rate; weights and gradients are non-zero."""
    ps = [value.numpy().copy() for value in values]
    ms = [numpy.zeros_like(p) for p in ps]
    for grads, lr in zip(grads_of_steps, rates, strict=True):
        for i, grad in enumerate(grads):
            p_norm = numpy.sqrt((ps[i] ** 2).sum())
            g_norm = numpy.sqrt((grad.numpy() ** 2).sum())
            g = grad.numpy() + weight_decay * ps[i]
            g = g * trust * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
            ms[i] = momentum * ms[i] + g
            ps[i] = ps[i] - lr * ms[i]
    return ps


def assert_close(params: list[nn.Parameter], expected: Sequence[numpy.ndarray]) -> None:
    for p, value in zip(params, expected, strict=True):
        numpy.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "trust"),
    [(0.0, 0.0, 0.001), (0.9, 0.0, 0.001), (0.9, 0.01, 0.001), (0.9, 0.5, 0.02)],
)
def test_six_steps_with_a_falling_rate(momentum: float, weight_decay: float, trust: float) -> None:
    values = random_tensors(0)
    grads = [random_tensors(1 + i, scale=10.0 ** (i - 3)) for i in range(6)]
    rates = [8.0, 8.0, 4.0, 2.0, 0.5, 0.0]
    params = parameters(values)
    optimiser = LARC(params, 1.0, momentum, weight_decay, trust)
    for lr, step_grads in zip(rates, grads, strict=True):
        optimiser.param_groups[0]["lr"] = lr
        step(optimiser, params, step_grads)
    assert_close(params, by_hand(values, grads, rates, momentum, weight_decay, trust))


def test_one_step_in_round_numbers() -> None:
    # ‖p‖ = 5, ‖g‖ = 10, wd·p = (0.6, 0.8), wd·‖p‖ = 1: (10.6, 0.8) · 0.001 · 5 / 11, times lr 2.2.
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    grad = torch.tensor([10.0, 0.0], dtype=torch.float64)
    step(LARC([p], lr=2.2, momentum=0.9, weight_decay=0.2), [p], [grad])
    assert p.tolist() == pytest.approx([3 - 0.0106, 4 - 0.0008], rel=1e-11)  # epsilon: 1e-9 of it


def test_epsilon_bounds_the_rate_of_a_vanishing_gradient() -> None:
    # ‖g‖ = 1e-8 doubles the denominator: half of trust · ‖p‖ remains.
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    step(LARC([p], lr=1.0, momentum=0.0), [p], [torch.tensor([1e-8], dtype=torch.float64)])
    assert 2 - p.item() == pytest.approx(0.001 * 2 / 2, rel=1e-9)


def test_a_zero_bias_takes_a_plain_first_step_and_an_adapted_second() -> None:
    bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimiser = LARC([bias], lr=0.5, momentum=0.5, weight_decay=0.1)
    step(optimiser, [bias], [torch.tensor([6.0, -8.0], dtype=torch.float64)])
    assert bias.tolist() == [-3, 4]
    # ‖p‖ = 5, ‖g‖ = 2, wd·p = (−0.3, 0.4): (1.7, 0.4) · 0.005 / 2.5; half the old step rolls on.
    step(optimiser, [bias], [torch.tensor([2.0, 0.0], dtype=torch.float64)])
    expected = [-3 - 0.5 * (3 + 1.7 * 0.002), 4 - 0.5 * (-4 + 0.4 * 0.002)]
    assert bias.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_zero_gradient_means_no_weight_decay_and_momentum_alone() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    zero = torch.zeros(2, dtype=torch.float64)
    optimiser = LARC([p], lr=1.0, momentum=0.5, weight_decay=0.1)
    step(optimiser, [p], [zero])
    assert p.tolist() == [3, 4]
    step(optimiser, [p], [torch.tensor([0.0, 2.0], dtype=torch.float64)])
    moved = [3 - 0.3 * 0.002, 4 - 2.4 * 0.002]  # (g + wd·p) · 0.001 · 5 / (2 + 0.5)
    assert p.tolist() == pytest.approx(moved, rel=1e-9)
    step(optimiser, [p], [zero])
    assert p.tolist() == pytest.approx([3 - 0.45 * 0.002, 4 - 3.6 * 0.002], rel=1e-9)


def test_a_parameter_without_a_gradient_stays() -> None:
    params = parameters(random_tensors(0))
    optimiser = LARC(params, 1.0, 0.9, weight_decay=0.1)
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimiser.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimiser.state


def test_gradients_are_left_as_they_are() -> None:
    bias = torch.zeros(4, dtype=torch.float64)  # its unscaled gradient must not become the buffer
    params = parameters([*random_tensors(0), bias])
    grads = [*random_tensors(1), torch.ones_like(bias)]
    optimiser = LARC(params, 1.0, 0.9, weight_decay=0.1)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    pointers = [p.grad.data_ptr() for p in params]
    for _ in range(3):
        optimiser.step()
    assert [p.grad.data_ptr() for p in params] == pointers
    for p, g in zip(params, grads, strict=True):
        assert torch.equal(p.grad, g)


def test_groups_keep_their_own_settings() -> None:
    values = random_tensors(0)
    grads = [random_tensors(1), random_tensors(2)]
    params = parameters(values)
    groups = [
        {"params": params[:1], "lr": 3.0, "momentum": 0.5, "weight_decay": 0.0},
        {"params": params[1:], "trust_coefficient": 0.01},
    ]
    optimiser = LARC(groups, 1.0, 0.9, weight_decay=0.2)
    for step_grads in grads:
        step(optimiser, params, step_grads)
    assert_close(params[:1], by_hand(values[:1], [g[:1] for g in grads], [3, 3], 0.5, 0))
    assert_close(params[1:], by_hand(values[1:], [g[1:] for g in grads], [1, 1], 0.9, 0.2, 0.01))


def test_a_group_that_does_not_adapt_is_plain_sgd() -> None:
    """Beside a group that adapts, over three steps, at another rate and weight decay."""
    values = random_tensors(0)
    grads = [random_tensors(1 + i) for i in range(3)]
    params, others = parameters(values), parameters(values[1:])
    groups = [
        {"params": params[:1]},
        {"params": params[1:], "adapts": False, "lr": 0.5, "weight_decay": 0.25},
    ]
    optimiser = LARC(groups, 2.0, 0.9, weight_decay=0.1)
    sgd = torch.optim.SGD(others, lr=0.5, momentum=0.9, weight_decay=0.25)
    for step_grads in grads:
        step(optimiser, params, step_grads)
        step(sgd, others, step_grads[1:])
    assert_close(params[:1], by_hand(values[:1], [g[:1] for g in grads], [2] * 3, 0.9, 0.1))
    assert_close(params[1:], [p.detach().numpy() for p in others])


def test_stacked_models_are_each_trained_as_alone() -> None:
    models = [random_tensors(10 + k, scale=10.0 ** (k - 1)) for k in range(3)]
    grads = [[random_tensors(20 + 3 * i + k) for k in range(3)] for i in range(4)]
    rates = [(8.0, 1.0, 0.5), (4.0, 0.5, 0.25), (2.0, 0.25, 0.1), (1.0, 0.0, 0.0)]
    params = parameters([torch.stack(tensors) for tensors in zip(*models, strict=True)])
    optimiser = LARC(params, 1.0, 0.9, weight_decay=0.1, trust_coefficient=0.02)
    for lrs, step_grads in zip(rates, grads, strict=True):
        optimiser.param_groups[0]["lr"] = torch.tensor(lrs, dtype=torch.float64)
        step(optimiser, params, [torch.stack(g) for g in zip(*step_grads, strict=True)])
    for k, values in enumerate(models):
        own_grads = [step_grads[k] for step_grads in grads]
        own_rates = [lrs[k] for lrs in rates]
        expected = by_hand(values, own_grads, own_rates, 0.9, 0.1, 0.02)
        for p, value in zip(params, expected, strict=True):
            numpy.testing.assert_allclose(p[k].detach().numpy(), value, rtol=1e-13, atol=1e-14)


def test_of_stacked_biases_only_those_that_are_zero_take_a_plain_step() -> None:
    # The second: ‖p‖ = 5, ‖g‖ = 2, (2, 0) · 0.001 · 5 / 2 = (0.005, 0), times lr 4.
    biases = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64))
    rates = torch.tensor([0.5, 4.0], dtype=torch.float64)
    gradient = torch.tensor([[6.0, -8.0], [2.0, 0.0]], dtype=torch.float64)
    step(LARC([biases], lr=rates, momentum=0.9), [biases], [gradient])
    assert biases[0].tolist() == [-3, 4]
    assert biases[1].tolist() == pytest.approx([3 - 0.02, 4], rel=1e-9)


def test_a_linear_classifier_in_float32_against_sgd_on_scaled_gradients() -> None:
    """As in test_runner.py, wd 0: the same gradients scaled by hand go to torch.optim.SGD."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 4), nn.Linear(6, 4)
    nn.init.zeros_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    larc = LARC(ours.parameters(), lr=1.6, momentum=0.9)
    sgd = torch.optim.SGD(theirs.parameters(), lr=1.6, momentum=0.9)
    features, labels = torch.randn(16, 6), torch.randint(4, (16,))
    for _ in range(4):
        for model, optimiser in ((ours, larc), (theirs, sgd)):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(features), labels).backward()
        for p in theirs.parameters():
            if p.norm() > 0:
                p.grad = p.grad * (0.001 * p.detach().norm() / p.grad.norm())
        larc.step()
        sgd.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.dtype == torch.float32
        assert p.requires_grad
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def test_a_saved_state_continues_identically() -> None:
    grads = [random_tensors(1 + i) for i in range(5)]
    params = parameters(random_tensors(0))
    optimiser = LARC(params, 2.0, 0.9, 0.1, trust_coefficient=0.01)
    for step_grads in grads[:2]:
        step(optimiser, params, step_grads)

    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    copies = parameters([p.detach() for p in params])
    resumed = LARC(copies, 7.0, 0.0)  # every setting comes from the file
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert {*optimiser.state_dict()["state"][0]} == {"momentum_buffer"}  # as SGD's

    for step_grads in grads[2:]:
        step(optimiser, params, step_grads)
        step(resumed, copies, step_grads)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)


def test_hooks_run_once_a_step() -> None:
    """A step that calls SGD's own step runs them twice."""
    other = nn.Parameter(torch.ones(1))
    torch.optim.SGD([other], lr=1.0)  # building one is what arms SGD.step for hooks
    p = nn.Parameter(torch.ones(1))
    optimiser = LARC([p], 1.0, 0.9)
    calls = []
    optimiser.register_step_post_hook(lambda *_: calls.append(1))
    step(optimiser, [p], [torch.ones(1)])
    assert calls == [1]


@pytest.mark.parametrize("lr", [1.0, torch.ones(3, device="meta")])
def test_a_step_never_asks_for_a_value(lr: float | Tensor) -> None:
    """Meta tensors have no values: .item(), bool(tensor) or float(tensor) raises on them."""
    p = nn.Parameter(torch.empty(3, 2, device="meta"))
    optimiser = LARC([p], lr, 0.9, weight_decay=0.1)
    for _ in range(2):
        p.grad = torch.empty_like(p)
        optimiser.step()
    assert optimiser.state[p]["momentum_buffer"].shape == (3, 2)


def test_a_nan_gradient_is_not_hidden() -> None:
    p = nn.Parameter(torch.ones(2))
    step(LARC([p], 1.0, 0.9), [p], [torch.tensor([float("nan"), 0.0])])
    assert p.isnan().all()
