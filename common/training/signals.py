"""SIGINT and SIGTERM become a wish to stop, granted where nothing is half done."""

from __future__ import annotations

import os
import signal
from types import FrameType

from common.runtime.errors import StopRequested
from common.runtime.ranks import Ranks


class StopFlag:
    """Set by SIGINT and SIGTERM, which no longer end the process by themselves.

    Alone at a terminal, a second Ctrl-C interrupts at once. Under torchrun signals come twice by
    design (from the terminal and from the launcher), so there they only set the flag.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def requested(self) -> bool:
        """Whether this process has been signalled."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention for a process ended by that signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def check(self) -> None:
        """Raise `StopRequested` on every rank if any has been signalled."""
        if self.ranks.any(self.requested):
            raise StopRequested(self.exit_status)
