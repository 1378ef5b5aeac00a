"""The signals that ask a run to stop."""

from __future__ import annotations

import signal

# Of Ctrl-C, `kill`, a terminal that was closed, Ctrl-\ and clusters that take a machine back.
# Windows has only the first two.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1")
STOP_SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
