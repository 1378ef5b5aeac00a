"""Data sets that torchvision downloads."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

from torchvision.datasets import CIFAR10, STL10

from common.runtime.errors import UserError
from common.runtime.ranks import Ranks

Content = TypeVar("Content")

SILENCE = 60  # seconds without a byte, after which a download has failed


@cache  # the checksums of STL-10's 3 GB take seconds, and two splits are asked for
def download(source: type[CIFAR10] | type[STL10], name: str, data_root: str, ranks: Ranks) -> None:
    """Rank 0 downloads a data set to `data_root` if its files are absent or differ; all wait.

    Args:
        source: torchvision's reader, CIFAR100 included.
        name: of the data set, for messages.

    Raises:
        UserError: on every rank, if it cannot be downloaded.
    """
    failure = None
    if ranks.is_main:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(SILENCE)
        try:
            source(data_root, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            failure = error
        finally:
            socket.setdefaulttimeout(before)
    if ranks.any(failure is not None):
        reason = failure or "on the first rank"
        raise UserError(
            f"{name} is not under {data_root} and could not be downloaded ({reason}); connect "
            f"to the network, put {source.filename} there, or try --dataset shapes"
        ) from failure


def read_everywhere(
    read: Callable[[], Content], name: str, folder: Path | str, ranks: Ranks
) -> Content:
    """Read a data set that only the first rank's machine is sure to have; all ranks wait.

    Args:
        name, folder: of the data set, for messages.

    Raises:
        UserError: on every rank, if one of them cannot read it.
    """
    content, failure = None, None
    try:
        content = read()
    except (OSError, RuntimeError) as error:
        failure = error
    if ranks.any(failure is not None):
        raise UserError(
            f"{name} is incomplete in {folder} ({failure or 'on another process'}); give every "
            "machine the same files"
        ) from failure
    return content
