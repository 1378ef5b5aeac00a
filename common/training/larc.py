"""LARC: SGD whose step is, tensor by tensor, a small share of the parameter's own norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Keeps the quotient finite, as in NVIDIA apex.
EPSILON = 1e-8


class LARC(torch.optim.Optimizer):
    """Layer-wise Adaptive Rate Control over SGD with momentum, scaling without clipping.

    You, Gitman & Ginsburg, *Large Batch Training of Convolutional Networks*, 2017
    (arXiv 1708.03888), as in NVIDIA apex's `LARC(SGD(…), trust_coefficient, clip=False)`:

        g ← (g + wd·p) · trust·‖p‖ / (‖g‖ + wd·‖p‖ + 1e-8)
        m ← momentum·m + g,    p ← p − lr·m

    each ‖·‖ over one whole tensor. Where ‖p‖ or ‖g‖ is 0, g stays as it is, without weight decay
    too, as in apex: a bias that starts from 0 takes a plain SGD step first, and a parameter that
    gets a zero gradient is moved by its momentum alone.

    Where a group's lr is a tensor `[K]`, its parameters `[K, …]` stack those of K models, and each
    model is trained as it would be alone: at its own rate, each ‖·‖ over its own slice.

    Gradients are taken as they are (under DDP already averaged over the ranks) and left as they
    are: `p.grad` is the same after a step. A step never waits for the device.

    Args:
        params: as for `torch.optim.SGD`; a schedule sets `param_groups[…]["lr"]`.
        lr: learning rate, 0 or more; or one for each of K stacked models, float `[K]` on the
            parameters' device, whose parameters then have two dimensions or more.
        momentum: in [0, 1); no dampening, no Nesterov.
        weight_decay: wd, 0 or more.
        trust_coefficient: about ‖update‖/‖p‖ at a learning rate of 1, without momentum.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float | Tensor,
        momentum: float,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            decay, trust = group["weight_decay"], group["trust_coefficient"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                lr, over = group["lr"], tuple(range(p.dim()))
                if isinstance(lr, Tensor):  # a model each slice: [K, 1, …] against [K, …]
                    lr, over = lr.view(-1, *[1] * (p.dim() - 1)), over[1:]
                p_norm = torch.linalg.vector_norm(p, dim=over, keepdim=True)
                g_norm = torch.linalg.vector_norm(p.grad, dim=over, keepdim=True)
                rate = trust * p_norm / (g_norm + decay * p_norm + EPSILON)
                # where, not if: Python's if would fetch both norms from the device.
                adapts = (p_norm != 0) & (g_norm != 0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                # In place: the products of K models would take their weights' memory once more.
                m = state["momentum_buffer"].mul_(group["momentum"])
                m.addcmul_(p.grad, rate.where(adapts, 1))
                if decay:
                    m.addcmul_(p, (decay * rate).where(adapts, 0))
                if isinstance(lr, Tensor):
                    p.addcmul_(m, lr, value=-1)
                else:
                    p.add_(m, alpha=-lr)
