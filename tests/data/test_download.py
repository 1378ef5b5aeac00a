"""common/data/download.py: who downloads, and what is told where it fails."""

from __future__ import annotations

import socket
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import CIFAR10

from common.data import in_memory
from common.data.in_memory import load_cifar
from common.data.photographs import find_photographs
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from published_files import forbid_downloads

ALONE = Ranks(0, 1, torch.device("cpu"))
LOADS: dict[str, Callable[[str, Ranks], object]] = {
    "CIFAR-10": lambda root, ranks: load_cifar("cifar10", root, 32, ranks),
    "CIFAR-100": lambda root, ranks: load_cifar("cifar100", root, 32, ranks),
    "STL-10": lambda root, ranks: find_photographs("stl10", root, 96, 0, 1, "train", ranks),
}
ARCHIVES = {
    "CIFAR-10": "cifar-10-python.tar.gz",
    "CIFAR-100": "cifar-100-python.tar.gz",
    "STL-10": "stl10_binary.tar.gz",
}


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File is corrupted.")])
@pytest.mark.parametrize("name", LOADS)
def test_without_network(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_downloads(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        LOADS[name](str(tmp_path), ALONE)
    assert str(caught.value) == (
        f"{name} is not under {tmp_path} and could not be downloaded ({error}); connect to the "
        f"network, put {ARCHIVES[name]} there, or try --dataset shapes"
    )


@pytest.mark.parametrize("name", LOADS)
def test_the_other_ranks_download_nothing_and_are_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_downloads(monkeypatch, AssertionError("only the first rank downloads"))
    told = []
    monkeypatch.setattr(Ranks, "any", lambda ranks, failed: told.append(failed) or True)
    with pytest.raises(UserError, match=rf"^{name} is not .* \(on the first rank\); connect"):
        LOADS[name](str(tmp_path), Ranks(1, 2, torch.device("cpu")))
    assert told == [False]


def test_a_silent_network_ends_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def download(source: object, root: str, download: bool) -> None:
        limits.append(socket.getdefaulttimeout())
        raise IncompleteRead(b"")

    monkeypatch.setattr(CIFAR10, "__init__", download)
    with pytest.raises(UserError, match="could not be downloaded"):
        load_cifar("cifar10", str(tmp_path), 32, ALONE)
    assert limits == [60]
    assert socket.getdefaulttimeout() is None


def test_a_machine_without_the_files_is_told_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first rank downloads."""
    monkeypatch.setattr(in_memory, "download", lambda *arguments: None)
    with pytest.raises(UserError, match=r"^CIFAR-10 is incomplete in .* \(.*\); give every mac"):
        load_cifar("cifar10", str(tmp_path), 32, ALONE)
