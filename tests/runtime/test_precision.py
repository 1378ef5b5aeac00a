"""When bf16 is used: on request, or by default if the processor reports its instructions."""

from __future__ import annotations

import pytest
import torch

from common.runtime.precision import Precision, autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("auto", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("auto", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("auto", {"bf16": True}, torch.bfloat16),  # ARM's name
        ("auto", {"avx2": True, "avx512_bf16": False}, torch.float32),
        ("auto", {}, torch.float32),
        ("bf16", {}, torch.bfloat16),
        ("fp32", {"avx512_bf16": True}, torch.float32),
    ],
)
def test_matrix_products_on_the_cpu(
    precision: Precision,
    capabilities: dict[str, bool],
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with autocast(precision, CPU):
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype == expected
