"""How scripts start, print and end: real processes on outputs that break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest

from scripts import ROOT

SCRIPT = '''"""Weights τ, and T̂."""
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.runtime.errors import StopRequested, UserError
from common.runtime.script import run_script


class Killed(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Huge(Killed):
    def __getitem__(self, index):
        return numpy.empty(2**60, numpy.uint8)


@dataclass(frozen=True)
class Config:
    end: str = "well"  # τ
    result: str = "result"
    fresh: bool = False


def main(config: Config) -> None:
    with Path(config.result).open("w") as file:
        for descriptor in (1, 2):
            with suppress(OSError):
                os.write(descriptor, b"by a library")
        bar = tqdm(total=100, mininterval=0)
        for step in range(100):
            bar.update()
            print("step", step, "T̂", os.fsdecode(b"\\xff"))
            if step == 50 and config.end == "error":
                raise UserError("a sentence")
            if step == 50 and config.end == "stop":
                raise StopRequested(143)
            if step == 50 and config.end == "worker":
                next(iter(DataLoader(Killed(), num_workers=1)))
            if step == 50 and config.end == "bug":
                raise RuntimeError("a bug")
            if step == 50 and config.end == "memory":
                torch.empty(2**50)
            if step == 50 and config.end == "memory of a worker":
                next(iter(DataLoader(Huge(), num_workers=1)))
            if step == 50 and config.end == "lost":
                raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
            if step == 50 and config.end == "memory of Python":
                bytes(2**62)
        file.write("complete")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
'''

# What standard output and standard error are redirected to.
BROKEN_OUTPUTS = {
    "full disk, output": (">/dev/full", ">file"),
    "full disk, errors": (">file", ">/dev/full"),
    "full disk, both": (">/dev/full", ">/dev/full"),
    "closed output": (">&-", ">file"),
    "closed errors": (">file", ">&-"),
    "closed both": (">&-", ">&-"),
    "closed all": ("<&- >&-", ">&-"),
}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


BUFFERED = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


def start(
    script: Path,
    *arguments: str,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=stdout,
        stderr=stderr,
        cwd=script.parent,
        env={**os.environ, **BUFFERED, **(environment or {})},
    )


def run(
    script: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[int, bytes, bytes]:
    process = start(script, *arguments, environment=environment)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("case", BROKEN_OUTPUTS)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_does_not_end_a_run(
    case: str, unbuffered: str, script: Path
) -> None:
    output, errors = BROKEN_OUTPUTS[case]
    redirected = f"{output.replace('file', 'output')} 2{errors.replace('file', 'errors')}"
    line = f'"{sys.executable}" {script.name} {redirected}; echo $? >status'
    environment = {**os.environ, **BUFFERED, "PYTHONUNBUFFERED": unbuffered}
    subprocess.run(["sh", "-c", line], cwd=script.parent, env=environment, timeout=60, check=True)

    assert (script.parent / "status").read_text() == "0\n"
    assert (script.parent / "result").read_text() == "complete"
    told = b"".join(
        (script.parent / name).read_bytes()
        for name in ("output", "errors")
        if (script.parent / name).exists()
    )
    reasons = {"full disk, output": b"output", "full disk, errors": b"error"}
    if case in reasons:
        message = b"\nwarning: standard %s cannot be written (No space left on device); the run"
        assert told.count(message % reasons[case]) == 1


def test_a_reader_that_left_does_not_end_a_run(script: Path) -> None:
    """As `| head -n 1` leaves."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(script, stdout=writing)
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.count(b"\nwarning: standard output cannot be written (Broken pipe); the run") == 1
    assert (script.parent / "result").read_text() == "complete"


def test_a_terminal_that_went_away_does_not_end_a_run(script: Path) -> None:
    pty = pytest.importorskip("pty")
    reading, terminal = pty.openpty()
    process = start(script, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert os.read(reading, 1)
    os.close(reading)
    assert process.wait(timeout=60) == 0
    assert (script.parent / "result").read_text() == "complete"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_every_sign_goes_through_on_every_encoding(encoding: str, script: Path) -> None:
    """τ and the circumflex are not in cp1252, and a name need not be in any encoding."""
    status, output, errors = run(script, "--help", environment={"PYTHONIOENCODING": encoding})
    assert status == 0, errors
    assert (b"\\u03c4" in output) == (encoding != "utf-8")
    status, output, errors = run(script, environment={"PYTHONIOENCODING": encoding})
    assert status == 0, errors
    assert output.count(b"\\udcff\n" if os.linesep == "\n" else b"\\udcff") == 100


ENDS = {
    "error": (1, b"\nerror: a sentence\n"),
    "stop": (143, b"\nStopped, with a checkpoint: the same command continues the run.\n"),
    "worker": (1, b"\nerror: a loader process was killed (DataLoader worker (pid"),
    "bug": (1, b"\nTraceback (most recent call last):\n"),
    "memory": (1, b"\nerror: too little memory ("),
    "memory of Python": (1, b"\nerror: too little memory (Python got none)"),
    "memory of a worker": (1, b"\nerror: a loader process had too little memory (Caught "),
    "lost": (1, b"\nerror: another process of this run has ended; its own message says why ("),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_last_message_starts_on_a_line_of_its_own(end: str, script: Path) -> None:
    expected, message = ENDS[end]
    status, _, errors = run(script, "--end", end)
    assert status == expected
    assert b"%|" in errors, "no progress bar"
    assert message in errors
    assert (b"Traceback" in errors) == (end == "bug")
    if end == "error":
        assert errors.endswith(message)


ADVICE = {
    "stop": b"the same command without --fresh continues ",
    "worker": b"repeat the command without --fresh with fewer --workers: a run continues ",
}


@pytest.mark.parametrize("end", ADVICE)
def test_the_advice_to_repeat_a_command_is_without_fresh(end: str, script: Path) -> None:
    _, _, errors = run(script, "--end", end, "--fresh")
    assert ADVICE[end] in errors


def test_a_leading_tilde_is_the_home_directory(script: Path) -> None:
    home = script.parent / "home"
    home.mkdir()
    status, _, errors = run(script, "--result=~/x", environment={"HOME": str(home)})
    assert status == 0, errors
    assert (home / "x").read_text() == "complete"


def test_a_second_checkout_is_not_run_with_the_first_one_s_code(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "common" / "runtime", clone / "common" / "runtime")
    (clone / "common" / "__init__.py").touch()
    script = clone / "experiment" / "run.py"
    script.parent.mkdir()
    script.write_text(SCRIPT, encoding="utf-8")
    status, _, errors = run(script)
    assert status == 1
    assert errors.decode().startswith(f"error: {script} would run with common/ of another checkout")
    assert f"{ROOT}, " in errors.decode()
    assert not (script.parent / "result").exists()
    remedy = errors.decode().partition("PYTHONPATH=")[2].partition(",")[0]
    status, _, errors = run(script, environment={"PYTHONPATH": remedy})
    assert status == 0, errors
