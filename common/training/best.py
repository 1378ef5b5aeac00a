"""`best.pt`: the network with the best kNN accuracy so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.runtime.errors import UserError, require
from common.training.checkpoint import read_checkpoint


def best_accuracy(path: Path, known: float, tell: Callable[[str], None]) -> float | None:
    """The accuracy that a later network has to exceed to be kept.

    A better network than the file's may have been found but not written, on a full disk; and the
    file's may be of an epoch that the checkpoint does not have, and that is trained again.

    Args:
        path: of best.pt.
        known: the best accuracy in the checkpoint, in percent.
        tell: prints a line, if the file is missing or damaged.

    Returns:
        In percent; None: the next network that is evaluated is kept.
    """
    try:
        written = read_checkpoint(path).get("knn")
        require(isinstance(written, float), f"{path} has no accuracy 'knn'")
    except UserError as error:
        tell(f"warning: {error}; the next evaluation of kNN writes a new best.pt")
        return None
    return min(known, written)
