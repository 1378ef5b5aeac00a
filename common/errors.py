"""What a user can mend is told in a sentence; a traceback is for bugs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

ConfigType = TypeVar("ConfigType")


class UserError(ValueError):
    """A setting, a file or a machine that a user can put right; the message says how."""


def run_script(main: Callable[[ConfigType], None], config: ConfigType) -> None:
    """Call `main(config)`; end with one line on stderr and status 1 on a `UserError`."""
    try:
        main(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
