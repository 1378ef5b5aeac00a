"""barlowtwins_imagenet's projector, and how its groups of parameters are trained."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import torch
from torch import nn

from assertions import seeded
from barlowtwins_imagenet.model import BarlowTwins, parameter_groups
from common.training.larc import LARC
from common.training.training import Training


def test_the_published_projector() -> None:
    with torch.device("meta"):
        projector = BarlowTwins("resnet50", 8192).projector
    count = sum(parameter.numel() for parameter in projector.parameters())
    assert count == 2048 * 8192 + 2 * 8192 * 8192 + 2 * 2 * 8192
    kinds = [type(layer) for layer in projector]
    block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*block, *block, nn.Linear]


def test_biases_and_batch_norm_neither_adapt_nor_decay_and_have_their_own_rate() -> None:
    """Three steps against a loop in float64; weights by LARC with decay, all else by plain SGD."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2)).double()
    optimiser = LARC(parameter_groups(network, 0.016), 1.0, momentum=0.9, weight_decay=0.1)
    training = SimpleNamespace(parts={"optimiser": optimiser})
    names = [name for name, _ in network.named_parameters()]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    expected = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
    momenta = {name: numpy.zeros_like(value) for name, value in expected.items()}
    for step, lr in enumerate((0.6, 0.3, 0.1)):
        Training.set_lr(training, lr)
        for position, (name, parameter) in enumerate(network.named_parameters()):
            generator = seeded(10 * step + position)
            g = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = g
            p, g, rate = expected[name], g.numpy(), 0.016 * lr
            if name in ("0.weight", "2.weight"):
                p_norm, g_norm = numpy.sqrt((p**2).sum()), numpy.sqrt((g**2).sum())
                g = (g + 0.1 * p) * 0.001 * p_norm / (g_norm + 0.1 * p_norm + 1e-8)
                rate = lr
            momenta[name] = 0.9 * momenta[name] + g
            expected[name] = p - rate * momenta[name]
        optimiser.step()
    for name, parameter in network.named_parameters():
        numpy.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-13)
