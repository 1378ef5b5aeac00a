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

import torch
import tyro

from common.augment.cifar10 import IMAGE_SIZE
from common.data.in_memory import load_cifar10
from common.runtime.errors import StopRequested, UserError, run_script
from common.runtime.ranks import Ranks
from common.training.run_folder import REPOSITORY
from common.training.signals import StopFlag

RESULTS = Path(__file__).resolve().parent
RUNS = REPOSITORY / "runs" / "miniature"

# One recipe for every method and regime, found with SimSiam's baseline, which learns slowest; only
# the heads differ.
RECIPE = {
    "backbone": "resnet10",
    "stem-stride": 2,
    "width": 16,
    "batch-size": 64,
    "base-lr": 0.5,
    "weight-decay": 1e-4,
    "epochs": 10,
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
    device: str = "cpu"  # of every run


class Run(NamedTuple):
    """One training: its name, its experiment and its flags beside the recipe."""

    name: str
    experiment: str
    flags: dict[str, object]


def plan() -> Iterator[Run]:
    """All runs: the first seed of everything, then the other seeds."""

    def run(method: str, regime: str, seed: int, variant: str = "", **flags: object) -> Run:
        name = f"{method}{variant}-{regime}-seed{seed}"
        flags = {name.replace("_", "-"): value for name, value in flags.items()}
        flags = {**METHODS[method], "regime": regime, "seed": seed, **flags}
        return Run(name, f"{method}_cifar10", flags)

    def table_1(seed: int) -> Iterator[Run]:
        return (run(method, regime, seed) for regime in REGIMES for method in METHODS)

    def table_2(seed: int) -> Iterator[Run]:
        for ops, magnitude in ((4, 10), (8, 16)):
            for regime in ("joint", "dssl"):
                heavy = {"randaug_num_ops": ops, "randaug_magnitude": magnitude}
                yield run("byol", regime, seed, f"-ra{ops}-{magnitude}", **heavy)

    yield from table_1(0)
    yield from table_2(0)
    for method in ("simsiam", "simclr"):
        for regime in ("joint", "dssl"):
            yield run(method, regime, 0, "-relative", translate_relative=True)
    for table in (table_1, table_2):
        for seed in SEEDS[1:]:
            yield from table(seed)


def command(run: Run, config: Config) -> list[str]:
    """What a user would type."""
    flags = {
        **RECIPE,
        **run.flags,
        "dataset": config.dataset,
        "data-root": config.data_root,
        "device": config.device,
        "precision": "fp32",  # on every processor: the runs may be spread over several
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


def is_kept(run: Run, dataset: str) -> bool:
    """Whether a finished run's logs lie in the results, of this data set and the recipe."""
    folder = RESULTS / run.name
    if not is_finished(folder):
        return False
    kept = json.loads((folder / "config.json").read_text())["config"]
    wanted = {**RECIPE, **run.flags, "dataset": dataset}
    return all(kept[name.replace("-", "_")] == value for name, value in wanted.items())


def keep(run: Run) -> None:
    """Copy a finished run's settings and metrics; paths of this machine are left out."""
    folder = RESULTS / run.name
    folder.mkdir(exist_ok=True)
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)  # of an earlier recipe
    settings = json.loads((RUNS / run.name / "config.json").read_text())
    for name in ("data_root", "run_dir"):
        settings["config"][name] = Path(settings["config"][name]).name
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    # Last and whole, since it says that the run is finished.
    partial = folder / "metrics.jsonl.partial"
    shutil.copy(RUNS / run.name / "metrics.jsonl", partial)
    partial.replace(metrics)


def main(config: Config) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    alone = Ranks(0, 1, torch.device("cpu"))
    if config.dataset == "cifar10":
        load_cifar10(config.data_root, IMAGE_SIZE, alone)  # two runs at once would both download
    runs = list(plan())
    waiting = [run for run in runs if not is_kept(run, config.dataset)]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    stop = StopFlag(alone)
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
