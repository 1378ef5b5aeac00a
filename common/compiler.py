"""What torch.compile needs beside torch."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from common.errors import require


def require_compiler(device: torch.device) -> None:
    """Refuse `--compile` on a CPU without a C++ compiler, where its first step would fail.

    Raises:
        UserError: with the way out.
    """
    if device.type != "cpu" or sys.platform == "win32":
        return
    # As torch finds it.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    require(
        shutil.which(compiler) is not None,
        f"--compile needs a C++ compiler, and there is no {compiler}: install it, name another in "
        "the environment variable CXX, or leave --compile out",
    )
