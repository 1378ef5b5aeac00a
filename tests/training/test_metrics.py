"""metrics.jsonl after everything that can happen to the file between two writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.training.metrics import Metrics, append_once
from processes import files

ROWS = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
LINES = [b'{"epoch": 1, "loss": 0.5}\n', b'{"epoch": 2, "loss": 0.25}\n']
TEXT = b"".join(LINES)


def link(path: Path) -> None:
    """The rows moved elsewhere, and a link to another file, which is not to be touched."""
    path.unlink()
    (path.parent / "precious").write_bytes(b"precious")
    path.symlink_to("precious")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# What happens to the file, what is told of it, and what it held that the rows do not.
EVENTS: dict[str, tuple[Callable[[Path], object], str, bytes | None]] = {
    "deleted": (Path.unlink, "was deleted or is not a regular file", None),
    "rotated": (lambda path: path.rename(path.with_name("old")), "was deleted or", None),
    "emptied": (lambda path: path.write_bytes(b""), f"was cut from {len(TEXT)} to 0 bytes", None),
    "cut": (lambda path: path.write_bytes(TEXT[:30]), f"was cut from {len(TEXT)} to 30", None),
    "zeros": (
        lambda path: path.write_bytes(LINES[0] + bytes(27)),
        "was changed in line 2",
        LINES[0] + bytes(27),
    ),
    "edited": (
        lambda path: path.write_bytes(TEXT.replace(b"0.5", b"0.6")),
        "was changed in line 1",
        TEXT.replace(b"0.5", b"0.6"),
    ),
    "a link": (link, "is not a regular file", None),
    "a pipe": (pipe, "is not a regular file", None),
}


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def metrics(tmp_path: Path, told: list[str]) -> Metrics:
    """With both rows, written."""
    metrics = Metrics(tmp_path / "metrics.jsonl", told.append)
    metrics.start("")
    for row in ROWS:
        metrics.append(row)
        metrics.flush()
    assert metrics.path.read_bytes() == TEXT
    assert told == []
    return metrics


def assert_restored(
    metrics: Metrics, told: list[str], event: str, rows: list[bytes], moved: str = "metrics.jsonl.1"
) -> None:
    _, message, kept = EVENTS[event]
    assert metrics.path.read_bytes() == b"".join(rows)
    assert not metrics.path.is_symlink()
    (line,) = told
    assert line.startswith(f"warning: {metrics.path} ")
    assert message in line
    if kept is None:
        assert moved not in files(metrics.path.parent)
    else:
        assert (metrics.path.parent / moved).read_bytes() == kept
        assert line.endswith(f"moved to {moved}")
    if event == "a link":
        assert (metrics.path.parent / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("event", EVENTS)
def test_during_a_run(event: str, metrics: Metrics, told: list[str]) -> None:
    EVENTS[event][0](metrics.path)
    metrics.append({"epoch": 3, "loss": 0.125})
    metrics.flush()
    third = b'{"epoch": 3, "loss": 0.125}\n'
    assert_restored(metrics, told, event, [*LINES, third])
    assert [row["epoch"] for row in metrics.rows()] == [1, 2, 3]
    metrics.append({"epoch": 4})
    metrics.flush()
    assert metrics.path.read_bytes() == TEXT + third + b'{"epoch": 4}\n'
    assert len(told) == 1


@pytest.mark.parametrize("event", EVENTS)
def test_between_two_starts(event: str, metrics: Metrics, told: list[str]) -> None:
    EVENTS[event][0](metrics.path)
    again = Metrics(metrics.path, told.append)
    again.start(TEXT.decode())
    assert_restored(again, told, event, LINES)
    assert again.rows() == ROWS


def test_what_came_after_the_checkpoint_is_removed_without_a_warning(
    metrics: Metrics, told: list[str]
) -> None:
    with metrics.path.open("ab") as file:
        file.write(b'{"epoch": 3, "lo')  # a kill within a row
    again = Metrics(metrics.path, told.append)
    again.start(LINES[0].decode())
    assert metrics.path.read_bytes() == LINES[0]
    assert told == []


def test_a_reader_keeps_its_file(metrics: Metrics) -> None:
    """`tail -f` shows the rows of the file that it opened."""
    with metrics.path.open("rb") as reader:
        reader.read()
        metrics.append({"epoch": 3})
        metrics.flush()
        assert reader.read() == b'{"epoch": 3}\n'


def test_nothing_waits_for_a_pipe(metrics: Metrics, told: list[str]) -> None:
    """A pipe that somebody reads could be written to; the rows still go into a file."""
    pipe(metrics.path)
    reader = os.open(metrics.path, os.O_RDONLY | os.O_NONBLOCK)
    thread = threading.Thread(target=metrics.flush, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert metrics.path.read_bytes() == TEXT


def test_the_same_result_is_appended_once(tmp_path: Path) -> None:
    path = tmp_path / "linear.jsonl"
    for row in (*ROWS, ROWS[1], ROWS[0]):
        append_once(path, row)
    assert path.read_bytes() == TEXT + LINES[0]
    path.write_bytes(TEXT + b'{"epo')
    append_once(path, ROWS[1])
    assert path.read_bytes().splitlines() == [*TEXT.splitlines(), b'{"epo', LINES[1][:-1]]
