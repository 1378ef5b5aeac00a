"""bf16 autocast where the hardware multiplies it natively."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context for forward passes; losses leave it and compute in fp32."""
    enabled = precision == "bf16" or (precision == "auto" and has_native_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


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
