"""Signals that stop a run, each sent to a process."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from common.runtime.errors import StopRequested
from common.runtime.ranks import Ranks
from common.training.signals import StopFlag
from processes import in_child

ALONE = Ranks(0, 1, torch.device("cpu"))
NUMBERS = [
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_is_a_request_to_stop(number: signal.Signals) -> None:
    def receive() -> int:
        for each in NUMBERS:
            signal.signal(each, signal.SIG_DFL)  # each would end the process
        stop = StopFlag(ALONE)
        stop.check()
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(StopRequested) as raised:
            stop.check()
        return raised.value.exit_status

    assert in_child(receive) == 128 + number


def test_nohup_keeps_a_run_going_when_its_terminal_is_closed() -> None:
    def receive() -> bool:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
        stop = StopFlag(ALONE)
        os.kill(os.getpid(), signal.SIGHUP)
        return stop.requested

    assert in_child(receive) is False


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_ctrl_c_interrupts_at_once_unless_a_launcher_sends_both(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    def receive() -> str:
        stop = StopFlag(ALONE)
        try:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            return "interrupted"
        return f"requested: {stop.requested}"

    assert in_child(receive) == ("requested: True" if launched else "interrupted")
