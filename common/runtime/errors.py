"""What a user can mend is told in a sentence; a traceback is for bugs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

ConfigType = TypeVar("ConfigType")


class UserError(ValueError):
    """A setting, a file or a machine that a user can put right; the message says how."""


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


class StopRequested(Exception):  # noqa: N818 (a wish, not an error)
    """Raised after a signal, where the run's state is whole, so that it can be saved.

    Args:
        exit_status: that the process should end with.
        message: what the user is told.
    """

    def __init__(
        self,
        exit_status: int,
        message: str = "Stopped, with a checkpoint: the same command continues the run.",
    ) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def run_script(main: Callable[[ConfigType], None], config: ConfigType) -> None:
    """Call `main(config)`; end with one line on stderr and status 1 on a `UserError`."""
    try:
        main(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
