"""Precision of the arithmetic: bf16 autocast, and TF32 on CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "bf16", "fp32"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context for forward passes; losses leave it and compute in fp32."""
    enabled = uses_bf16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether forward passes run in bf16: on request, or by "auto" where the hardware has it."""
    return precision == "bf16" or (precision == "auto" and has_native_bf16(device))


def shared_casts(device: torch.device) -> AbstractContextManager[object]:
    """The context of a training step, in which passes under `autocast` share the weights' casts.

    Autocast keeps the bf16 copy of a weight that gets a gradient until its outermost context ends.
    Without this one, each forward pass would cast every weight again, as those of target networks
    do. Enter it once a step: after a change of the weights the copies are out of date. Arithmetic
    outside `autocast` stays in fp32.

    The gradients of two passes in one backward pass are then added in bf16. It is for CUDA alone,
    where each cast is a kernel to launch; elsewhere it does nothing.
    """
    if device.type == "cuda":
        return torch.autocast("cuda", enabled=False)
    return nullcontext()


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 as it is: for sums, whose digits narrower types do not hold."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose_cuda_arithmetic() -> None:
    """What fp32 arithmetic means on CUDA, and how cuDNN picks its algorithms.

    Convolutions, which only the network has, round their inputs to TF32 (10 bits of mantissa), as
    by PyTorch's default. Matrix products stay in full fp32: kNN and the losses compare images by
    them. The network's shapes are few, so cuDNN measures its algorithms for each at the first use.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32's here, by what the hardware reports.

    MPS counts as no: not every Apple chip has it, and none says which.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without these instructions oneDNN emulates bf16, several times slower than fp32.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
