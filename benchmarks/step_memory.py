"""Activations that a dssl step keeps for its backward passes, at their peak.

    python benchmarks/step_memory.py

Counts the bytes that autograd saves, without parameters, in float32, for the same batch: one
backward pass after all forward passes, against a backward pass for each part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import tyro
from torch import Tensor, nn

from common.dssl import loss_parts
from common.views import Views
from contest import machine
from simsiam_cifar10.loss import pair_loss
from simsiam_cifar10.model import SimSiam as CifarSimSiam
from simsiam_imagenet.model import SimSiam as ImageNetSimSiam


class Saved:
    """A tensor that autograd keeps; counts its storage once, however often it is saved."""

    alive: dict[int, int] = {}  # noqa: RUF012  how often each storage is held
    bytes = 0
    peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        held = Saved.alive.get(self.key, 0)
        Saved.alive[self.key] = held + 1
        Saved.bytes += 0 if held else self.size
        Saved.peak = max(Saved.peak, Saved.bytes)

    def __del__(self) -> None:
        Saved.alive[self.key] -= 1
        if not Saved.alive[self.key]:
            del Saved.alive[self.key]
            Saved.bytes -= self.size


def peak_bytes(
    network: nn.Module, views: Views, reverse_weight: float, together: bool
) -> tuple[int, list[Tensor]]:
    """The largest number of bytes saved at a time during a step, and the gradients."""
    kept = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor: Tensor) -> Tensor | Saved:
        return tensor if tensor.untyped_storage().data_ptr() in kept else Saved(tensor)

    def unpack(saved: Tensor | Saved) -> Tensor:
        return saved.tensor if isinstance(saved, Saved) else saved

    Saved.peak = 0
    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        parts = loss_parts(network, network, views, "dssl", pair_loss, reverse_weight)
        if together:
            sum(part.loss for part in list(parts)).backward()
        else:
            for part in parts:
                part.loss.backward()
    return Saved.peak, [parameter.grad.clone() for parameter in network.parameters()]


def show(
    name: str, make: Callable[[], nn.Module], reverse_weight: float, batch: int, size: int
) -> None:
    torch.manual_seed(0)
    network = make().to(memory_format=torch.channels_last)
    shape = (batch, 3, size, size)
    views = Views(*(torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(4)))
    whole, expected = peak_bytes(network, views, reverse_weight, together=True)
    parts, gradients = peak_bytes(network, views, reverse_weight, together=False)
    apart = max(
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(gradients, expected, strict=True)
        if float(theirs.norm()) > 1e-6
    )
    what = f"{name}, reverse weight {reverse_weight}, batch {batch}"
    print(f"saved activations of a dssl step, {what}  [{machine()}]")
    print(f"  all parts until one backward   {whole / 2**20:8.1f} MiB   1.00 ×")
    print(f"  each part backward at once     {parts / 2**20:8.1f} MiB   {parts / whole:.2f} ×")
    print(f"  largest relative difference of a tensor's gradient: {apart:.1e}")


def main() -> None:
    for reverse_weight in (0.1, 0.0):
        show(
            "ResNet-18 at 32 px (simsiam_cifar10)",
            lambda: CifarSimSiam("resnet18", 64, 2048, 512),
            reverse_weight,
            batch=32,
            size=32,
        )
    show(
        "ResNet-50 at 224 px (simsiam_imagenet)",
        lambda: ImageNetSimSiam("resnet50", 2048, 512),
        0.0,
        batch=8,
        size=224,
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
