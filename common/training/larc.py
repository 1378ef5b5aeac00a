"""LARC: SGD whose step is, tensor by tensor, a small share of the parameter's own norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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

    each ‖·‖ over one whole tensor. Where ‖p‖ or ‖g‖ is 0, g stays as it is and gets no
    weight decay, as in apex: a bias that starts from 0 takes a plain SGD step first, and a
    parameter that gets a zero gradient is moved by its momentum alone.

    A group of parameters with `"adapts": False` is trained by plain SGD, g ← g + wd·p, such as
    Barlow Twins' biases and BatchNorm parameters.

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
            "adapts": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            momenta = [self._momentum(p) for p in params]
            decay, lr = group["weight_decay"], group["lr"]
            stacked = isinstance(lr, Tensor)
            torch._foreach_mul_(momenta, group["momentum"])
            if group["adapts"]:
                p_norms, g_norms = norms(params, stacked), norms(grads, stacked)
                rates = group["trust_coefficient"] * p_norms / (g_norms + decay * p_norms + EPSILON)
                # where, not if: Python's if would wait for both norms from the device.
                adapts = (p_norms != 0) & (g_norms != 0)
                # In place: the products of K models would take their weights' memory once more.
                for m, g, rate in zip(momenta, grads, rates.where(adapts, 1), strict=True):
                    m.addcmul_(g, against(rate, g))
                if decay:
                    decays = (decay * rates).where(adapts, 0)
                    for m, p, rate in zip(momenta, params, decays, strict=True):
                        m.addcmul_(p, against(rate, p))
            else:
                torch._foreach_add_(momenta, grads)
                torch._foreach_add_(momenta, params, alpha=decay)
            if stacked:
                for p, m in zip(params, momenta, strict=True):
                    p.addcmul_(m, against(lr, p), value=-1)
            else:
                torch._foreach_add_(params, momenta, alpha=-lr)

    def _momentum(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def norms(tensors: Sequence[Tensor], stacked: bool) -> Tensor:
    """‖·‖ of each of n tensors, `[n]`, or of each of their K slices, `[n, K]`."""
    if stacked:
        return torch.stack([torch.linalg.vector_norm(t.flatten(1), dim=1) for t in tensors])
    return torch.stack(torch._foreach_norm(tensors))


def against(factor: Tensor, tensor: Tensor) -> Tensor:
    """A factor `[]`, or `[K]` for the K slices of a tensor, so that it broadcasts over it."""
    return factor.view(*factor.shape, *[1] * (tensor.dim() - factor.dim()))
