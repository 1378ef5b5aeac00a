"""The CIFAR-10 tables in miniature: methods × regimes × seeds, heavier T̂, and an ablation.

    python results/miniature/campaign.py                      downloads CIFAR-10
    python results/miniature/campaign.py --dataset folder --data-root DIR

Hours on a CPU: `--jobs` runs of one thread at a time. Stop it whenever you like and type the same
again: every run goes on from its own checkpoint, and what is finished is not repeated. A finished
run's config.json and metrics.jsonl are copied to `results/miniature/<run>`; then
`python results/miniature/report.py` makes the tables and the plot.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from common.distributed import Ranks
from common.errors import StopRequested, UserError, run_script
from common.run_log import REPOSITORY
from common.stop import StopFlag

RESULTS = Path(__file__).resolve().parent
RUNS = REPOSITORY / "runs" / "miniature"

# One recipe for every method and regime; method by method only the learning rate and the heads.
RECIPE = {
    "backbone": "resnet10",
    "stem-stride": 2,
    "width": 16,
    "batch-size": 64,
    "epochs": 12,
    "warmup-epochs": 1,
    "linear-epochs": 10,
}
METHODS: dict[str, dict[str, object]] = {
    "simclr": {"hidden-dim": 512, "projector-dim": 128},
    "byol": {"hidden-dim": 512, "projector-dim": 128},
    "simsiam": {"projector-dim": 512, "predictor-dim": 128},
}
REGIMES = ("baseline", "joint", "dssl")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Config:
    dataset: Literal["cifar10", "folder"] = "cifar10"  # a folder holds train/<class>, val/<class>
    data_root: str = str(REPOSITORY / "data")  # where CIFAR-10 lies or is put; the folder
    jobs: int = 2  # runs at a time, of one thread each
    device: str = "cpu"


class Run(NamedTuple):
    """One training: its name, its experiment and its flags beside the recipe."""

    name: str
    experiment: str
    flags: dict[str, object]


def plan() -> Iterator[Run]:
    """All runs, the first seed of everything first."""
    for seed in SEEDS:
        for method, heads in METHODS.items():
            for regime in REGIMES:
                flags = {**heads, "regime": regime, "seed": seed}
                yield Run(f"{method}-{regime}-seed{seed}", f"{method}_cifar10", flags)
        for num_ops, magnitude in ((4, 10), (8, 16)):
            for regime in ("joint", "dssl"):
                heavy = {"randaug-num-ops": num_ops, "randaug-magnitude": magnitude}
                flags = {**METHODS["byol"], **heavy, "regime": regime, "seed": seed}
                name = f"byol-ra{num_ops}-{magnitude}-{regime}-seed{seed}"
                yield Run(name, "byol_cifar10", flags)
        if seed == 0:
            for method in ("simclr", "simsiam"):
                for regime in ("joint", "dssl"):
                    flags = {**METHODS[method], "regime": regime, "seed": seed}
                    name = f"{method}-relative-{regime}-seed{seed}"
                    yield Run(name, f"{method}_cifar10", {**flags, "translate-relative": True})


def command(run: Run, config: Config) -> list[str]:
    """What a user would type."""
    flags = {
        **RECIPE,
        **run.flags,
        "dataset": config.dataset,
        "data-root": config.data_root,
        "device": config.device,
        "run-dir": RUNS / run.name,
    }
    words = [sys.executable, str(REPOSITORY / run.experiment / "run.py")]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def is_finished(folder: Path) -> bool:
    """Whether a run has written its linear accuracy, which comes last."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return False
    return any("linear" in json.loads(line) for line in metrics.read_text().splitlines())


def keep(run: Run) -> None:
    """Copy a finished run's settings and metrics; paths of this machine are left out."""
    folder = RESULTS / run.name
    folder.mkdir(exist_ok=True)
    shutil.copy(RUNS / run.name / "metrics.jsonl", folder)
    settings = json.loads((RUNS / run.name / "config.json").read_text())
    for name in ("data_root", "run_dir"):
        settings["config"][name] = Path(settings["config"][name]).name
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(config: Config) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    runs = list(plan())
    waiting = [run for run in runs if not is_finished(RESULTS / run.name)]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    stop = StopFlag(Ranks(0, 1, None))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    working: dict[subprocess.Popen, Run] = {}
    failed = []
    while waiting or working:
        while waiting and len(working) < config.jobs and not stop.requested:
            run = waiting.pop(0)
            with (RUNS / f"{run.name}.log").open("a") as output:
                process = subprocess.Popen(
                    command(run, config), stdout=output, stderr=output, env=environment
                )
            working[process] = run
            print(f"{time.strftime('%H:%M')} started  {run.name}", flush=True)
        if stop.requested:
            for process in working:
                process.terminate()  # it stops after the step under way, with a checkpoint
            for process in working:
                process.wait()
            raise StopRequested(stop.exit_status)
        time.sleep(1)
        for process in [process for process in working if process.poll() is not None]:
            run = working.pop(process)
            if process.returncode == 0 and is_finished(RUNS / run.name):
                keep(run)
                print(f"{time.strftime('%H:%M')} finished {run.name}", flush=True)
            else:
                failed.append(run.name)
                log = RUNS / f"{run.name}.log"
                print(f"{time.strftime('%H:%M')} FAILED   {run.name}: see {log}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} runs failed ({', '.join(failed)}); type the same again")


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
