"""How a script starts and ends: its command line, its errors, its exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import tyro

from common.runtime import launch
from common.runtime.errors import StopRequested, UserError
from common.runtime.memory import is_out_of_memory
from common.runtime.output import close_bars, protect_output
from common.runtime.repository import require_own_code

ConfigType = TypeVar("ConfigType")


def run_script(
    main: Callable[[ConfigType], None], config_type: type[ConfigType], description: str | None
) -> None:
    """Read the command line into a `config_type` and call `main` with it.

    A `UserError`, or an error for lack of memory or of another process, ends the process with one
    line on standard error and status 1; a stop request with 128 plus the signal's number.

    Args:
        config_type: a dataclass of plain values; texts that begin with ~ become paths.
        description: what `--help` prints first.
    """
    protect_output()
    config = None
    try:
        require_own_code(Path(sys.modules["__main__"].__file__))
        config = tyro.cli(config_type, description=description)
        try:
            main(_expand_home(config))
        finally:
            close_bars()
        # Only now: main's variables, DDP among them, are deleted.
        launch.finish()
    except UserError as error:
        sys.exit(f"error: {_advice(str(error), config)}")
    except StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            print(_advice(str(stop), config), file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        message = _sentence(error, config)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def _sentence(error: Exception, config: object) -> str | None:
    """What to tell of an error that is no bug; None: it may be one."""
    reason = str(error).strip().partition("\n")[0]
    is_killed = "killed by signal" in f"{error} {error.__cause__}"
    if "DataLoader worker" in reason and (is_killed or is_out_of_memory(error)):
        what = "was killed" if is_killed else "had too little memory"
        again = "repeat the command" + " without --fresh" * getattr(config, "fresh", False)
        return (
            f"a loader process {what} ({reason}){', probably for lack of memory' * is_killed}; "
            f"{again} with fewer --workers: a run continues from its last checkpoint"
        )
    if is_out_of_memory(error):
        where = ", in a new run (--fresh)" * hasattr(config, "fresh")
        return (
            f"too little memory ({reason or 'Python got none'}); use a smaller batch, smaller "
            f"images or a smaller network{where}"
        )
    # gloo's words; with NCCL torchrun ends the processes that wait.
    if any(sign in reason for sign in ("closed by peer", "reset by peer")):
        return f"another process of this run has ended; its own message says why ({reason})"
    return None


def _advice(message: str, config: object) -> str:
    """A message that may advise to repeat the command, which with `--fresh` begins anew."""
    if getattr(config, "fresh", False):
        return message.replace("the same command", "the same command without --fresh")
    return message


def _expand_home(config: ConfigType) -> ConfigType:
    """Replace a leading ~, which shells leave as it is in `--run-dir=~/x`."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    expanded = {
        name: str(Path(value).expanduser())
        for name, value in values.items()
        if isinstance(value, str) and value.partition("/")[0] == "~"
    }
    return replace(config, **expanded)
