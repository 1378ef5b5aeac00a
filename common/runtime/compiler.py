"""What torch.compile needs besides torch."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from common.runtime.errors import require


def require_compiler(device: torch.device) -> None:
    """Refuse `--compile` if its first step would fail, on Linux and macOS, for CPU and CUDA.

    Raises:
        UserError: if a compiler or Python's headers are missing.
    """
    if device.type not in ("cpu", "cuda") or sys.platform == "win32":
        return
    # The compilers that torch, or Triton, would call.
    variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if device.type == "cuda":
        variable, names = "CC", ["gcc", "clang"]
    if variable in os.environ:
        names = [os.environ[variable]]
    require(
        any(shutil.which(name) for name in names),
        f"--compile needs a compiler, and there is no {' or '.join(names)}: install it, name "
        f"another in the environment variable {variable}, or run without --compile",
    )
    include = Path(sysconfig.get_paths()["include"])
    require(
        (include / "Python.h").exists(),
        f"--compile needs Python's headers, and there is no {include / 'Python.h'}: install them "
        "(on Debian and Ubuntu, python3-dev), or run without --compile",
    )


def options(device: torch.device) -> dict[str, bool] | None:
    """On CUDA, kernels that do not need each other's results become one."""
    # It was counted with 2.14; 2.6 fails with it.
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    return {"combo_kernels": True} if device.type == "cuda" and version >= (2, 14) else None


def compile_in_place(device: torch.device, *modules: nn.Module) -> None:
    """torch.compile each module, as one graph also inside DDP.

    By default each module in DDP is split into a graph per bucket of gradients, to send the first
    buckets during the backward pass. Of a step's several backward passes only the last sends any.
    """
    torch._dynamo.config.optimize_ddp = False
    for module in modules:
        module.compile(options=options(device))
