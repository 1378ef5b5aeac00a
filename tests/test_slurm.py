"""docs/slurm.sbatch with SLURM's commands replaced by scripts that write down their calls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

BATCH_SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "slurm.sbatch"
WRITE_DOWN = 'echo "$(basename "$0") $*" >> "$CALLS"\n'
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; exit; fi\n' + WRITE_DOWN,
    "scancel": WRITE_DOWN + 'kill -TERM "$(cat "$CALLS.step")"\n',
    # A step: until SIGTERM, after which it takes half a second to end; or, with STATUS, ends so.
    "srun": WRITE_DOWN + 'trap \'sleep 0.5; echo "the step ends" >> "$CALLS"; exit 1\' TERM\n'
    'echo $$ > "$CALLS.step"\n'
    'if [ -n "$STATUS" ]; then exit "$STATUS"; fi\n'
    "while true; do sleep 0.05; done\n",
}
STEP = (
    "srun --kill-on-bad-exit=1 --cpus-per-task=4 torchrun --nnodes 2 --nproc-per-node 8 "
    "--rdzv-id 40007 --rdzv-backend c10d --rdzv-endpoint node1:10007 x/run.py --epochs 3"
)


def start(folder: Path, **variables: str) -> subprocess.Popen:
    """Start the batch script as SLURM does, for job 40007 on two machines of eight GPUs."""
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    for name, text in COMMANDS.items():
        (folder / name).write_text("#!/bin/bash\n" + text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "SLURM_JOB_ID": "40007",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
        **variables,
    }
    return subprocess.Popen(
        ["bash", str(BATCH_SCRIPT), "x/run.py", "--epochs", "3"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_before_the_time_limit_the_step_stops_and_then_the_job_is_requeued(tmp_path: Path) -> None:
    script = start(tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls.step").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # the script waits for the step
    script.send_signal(signal.SIGUSR1)
    script.wait(timeout=30)
    stop = "scancel --signal=TERM 40007.0"
    assert calls(tmp_path) == [STEP, stop, "the step ends", "scontrol requeue 40007"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_step_that_ends_by_itself_is_not_requeued(tmp_path: Path, status: int) -> None:
    script = start(tmp_path, STATUS=str(status))
    assert script.wait(timeout=30) == status
    assert calls(tmp_path) == [STEP]
