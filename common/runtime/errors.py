"""Errors that a user can correct are told in one sentence; a traceback is for bugs."""

from __future__ import annotations


class UserError(ValueError):
    """An error in a setting, a file or the machine's setup; the message says how to correct it."""


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


class StopRequested(Exception):  # noqa: N818 (a request, not an error)
    """Raised after a signal, between two steps, where a checkpoint can be written.

    Args:
        exit_status: of the process.
        message: what the user is told.
    """

    def __init__(
        self,
        exit_status: int,
        message: str = "Stopped, with a checkpoint: the same command continues the run.",
    ) -> None:
        super().__init__(message)
        self.exit_status = exit_status
