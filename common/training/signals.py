"""Signals become a request to stop, which is carried out between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType

from common.runtime.errors import StopRequested
from common.runtime.ranks import Ranks
from common.runtime.stop_signals import STOP_SIGNALS


class StopFlag:
    """Set by any of `STOP_SIGNALS`, which no longer end the process by themselves.

    A process alone at a terminal is interrupted at once by a second Ctrl-C. Under torchrun each
    signal comes twice, from the terminal and from the launcher, so there they only set the flag.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signal: int | None = None
        self.failed = False
        for number in STOP_SIGNALS:
            # nohup lets a process ignore SIGHUP. SIGINT is ignored in every shell script's `&`.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def fail(self) -> None:
        """Request a stop because of an error that was printed; the exit status is then 1."""
        self.failed = True

    @property
    def requested(self) -> bool:
        """Whether this process has received a signal or an error."""
        return self.failed or self.signal is not None

    @property
    def exit_status(self) -> int:
        """The shell's convention for a process ended by that signal; 1 after an error."""
        return 1 if self.failed else 128 + (self.signal or signal.SIGTERM)

    def check(self) -> None:
        """Raise `StopRequested` on every rank if any has received a signal."""
        if self.ranks.any(self.requested):
            raise StopRequested(self.exit_status)
