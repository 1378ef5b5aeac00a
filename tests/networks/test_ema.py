"""common/networks/ema.py against the moving average written out by hand."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

from common.networks.ema import make_target, update


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def set_parameters(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def copies(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_same(tensors: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, value in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, value)


def test_one_update_in_round_numbers() -> None:
    online, target = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        target.weight.copy_(torch.tensor([[8.0, -4.0]]))
        target.bias.fill_(0)
        online.weight.copy_(torch.tensor([[0.0, 4.0]]))
        online.bias.fill_(-16)
    update(target, online, 0.75)
    assert target.weight.tolist() == [[6, -2]]
    assert target.bias.tolist() == [-4]


@pytest.mark.parametrize("decay", [0.99, 0.3])
def test_five_updates_of_a_moving_online_network(decay: float) -> None:
    online = network().double()
    target = make_target(online)
    expected = [p.numpy() for p in copies(online)]
    for seed in range(1, 6):
        set_parameters(online, seed)
        update(target, online, decay)
        expected = [
            decay * x + (1 - decay) * p.numpy()
            for x, p in zip(expected, copies(online), strict=True)
        ]
    for p, value in zip(target.parameters(), expected, strict=True):
        numpy.testing.assert_allclose(p.numpy(), value, rtol=1e-13, atol=1e-14)


def test_decay_0_copies_and_decay_1_keeps() -> None:
    online, target = network(0), network(1)
    before = copies(target)
    update(target, online, 1)
    assert_same(copies(target), before)
    update(target, online, 0)
    assert_same(copies(target), copies(online))


def test_a_target_that_agrees_does_not_drift() -> None:
    online = network()
    target = make_target(online)
    for _ in range(20):
        update(target, online, 0.99)
    assert_same(copies(target), copies(online))


def test_buffers_come_from_the_targets_own_passes() -> None:
    online = network()
    target = make_target(online)
    online(torch.randn(8, 4) + 5)  # moves the online averages only
    own = [b.clone() for b in target.buffers()]
    update(target, online, 0.5)
    assert_same([*target.buffers()], own)
    assert target[1].num_batches_tracked.item() == 0
    assert target[1].num_batches_tracked.dtype == torch.int64

    x = torch.randn(8, 4) - 5
    with torch.no_grad():
        target(x)
        mean = target[0](x).mean(dim=0)
    update(target, online, 0.5)
    assert torch.allclose(target[1].running_mean, 0.1 * mean, rtol=1e-5)
    assert target[1].num_batches_tracked.item() == 1


def test_the_online_network_is_untouched() -> None:
    online, target = network(0), network(1).requires_grad_(False)
    online(torch.randn(8, 4)).sum().backward()
    values, grads = copies(online), [p.grad.clone() for p in online.parameters()]
    buffers = [b.clone() for b in online.buffers()]
    update(target, online, 0.5)
    assert_same(copies(online), values)
    assert_same([p.grad for p in online.parameters()], grads)
    assert_same([*online.buffers()], buffers)
    assert all(p.requires_grad for p in online.parameters())


def test_in_place_and_without_a_graph() -> None:
    online = network()
    target = make_target(online)
    set_parameters(online, 1)
    pointers = [p.data_ptr() for p in target.parameters()]
    update(target, online, 0.5)
    assert [p.data_ptr() for p in target.parameters()] == pointers
    for p in target.parameters():
        assert not p.requires_grad
        assert p.grad_fn is None
        assert p.is_leaf


def test_every_dtype_is_kept() -> None:
    online = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2), nn.Linear(2, 2).double())
    target = make_target(online)
    with torch.no_grad():
        for p, q in zip(target.parameters(), online.parameters(), strict=True):
            p.fill_(4)
            q.fill_(-4)
    update(target, online, 0.75)
    dtypes = [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.float64] * 2
    assert [p.dtype for p in target.parameters()] == dtypes
    assert [p.dtype for p in online.parameters()] == dtypes
    assert all((p == 2).all() for p in target.parameters())


def test_make_target_is_a_detached_copy() -> None:
    online = network()
    online(torch.randn(8, 4)).sum().backward()  # non-trivial buffers, and gradients
    target = make_target(online)
    assert_same(copies(target), copies(online))
    assert_same([*target.buffers()], [*online.buffers()])
    own = {t.data_ptr() for t in online.state_dict().values()}
    assert own.isdisjoint(t.data_ptr() for t in target.state_dict().values())
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())
    assert all(p.grad is not None and p.requires_grad for p in online.parameters())
    assert not target(torch.randn(8, 4)).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_make_target_keeps_the_mode(training: bool) -> None:
    online = network().train(training)
    assert all(module.training is training for module in make_target(online).modules())


def test_the_online_network_may_be_wrapped() -> None:
    """DDP's wrapper adds a level of names, not parameters: order is what counts."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    online = network()
    target = make_target(online)
    set_parameters(online, 3)
    update(target, Wrapper(online), 0)
    assert_same(copies(target), copies(online))
