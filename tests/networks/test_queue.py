"""The queue of keys against a plain list."""

from __future__ import annotations

import io

import torch

from common.networks.queue import KeyQueue


def keys_of(step: int, count: int) -> torch.Tensor:
    return torch.full((count, 3), float(step)) + torch.arange(count)[:, None] / 100


def test_it_holds_the_last_keys_in_order_whatever_the_batch() -> None:
    """Ten keys; batches of 4, 3 and all 10: neither the first nor the second divides it."""
    torch.manual_seed(0)
    queue = KeyQueue(10, 3)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(10))
    held = [row.tolist() for row in queue.keys]  # oldest first
    for step, count in enumerate([4, 4, 3, 10, 4, 3, 1]):
        pushed = keys_of(step, count)
        queue.push(pushed)
        held = held[count:] + pushed.tolist()
        oldest = int(queue.position)
        rows = queue.keys.roll(-oldest, dims=0).tolist()
        assert rows == held, f"step {step}"
    assert int(queue.position) == (4 + 4 + 3 + 10 + 4 + 3 + 1) % 10


def test_keys_stay_where_they_are_until_they_are_the_oldest() -> None:
    queue = KeyQueue(4, 3)
    queue.push(keys_of(1, 3))
    queue.push(keys_of(2, 2))
    expected = [keys_of(2, 2)[1], *keys_of(1, 3)[1:], keys_of(2, 2)[0]]
    assert torch.equal(queue.keys, torch.stack(expected))


def test_a_saved_queue_continues_identically() -> None:
    torch.manual_seed(0)
    queue = KeyQueue(5, 3)
    queue.push(keys_of(1, 3))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    resumed = KeyQueue(5, 3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for copy in (queue, resumed):
        copy.push(keys_of(2, 4))
    assert torch.equal(queue.keys, resumed.keys)
    assert torch.equal(queue.position, resumed.position)
    assert not list(queue.parameters())


def test_keys_of_a_lower_precision_enter_as_float32_and_without_a_graph() -> None:
    queue = KeyQueue(4, 3)
    queue.push(keys_of(1, 2).bfloat16().requires_grad_())
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad
    assert torch.equal(queue.keys[:2], keys_of(1, 2).bfloat16().float())


def test_pushing_never_asks_for_a_value() -> None:
    """Meta tensors have no values: .item() or an index made from one raises on them."""
    queue = KeyQueue(4, 3).to("meta")
    queue.push(torch.empty(3, 3, device="meta"))
    assert queue.keys.shape == (4, 3)
