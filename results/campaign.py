"""Many training runs by one command.

    python results/campaign.py miniature      the CIFAR-10 tables in miniature, 10 epochs a run
    python results/campaign.py long           SimSiam at 100 and 200 epochs, then BYOL
    python results/campaign.py long --dataset folder --data-root DIR

Hours on a CPU; without --dataset, CIFAR-10 is downloaded. Stop a campaign at any time: the same
command continues every run from its own checkpoint and does not repeat finished ones. A finished
run's config.json and metrics.jsonl are copied to `results/<campaign>/<run>`; then
`python results/<campaign>/report.py` makes the tables and the plot.
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
from common.data.in_memory import load_cifar
from common.runtime.errors import StopRequested, UserError
from common.runtime.ranks import Ranks
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script
from common.training.settings import Positive, check_settings
from common.training.signals import StopFlag

RESULTS = Path(__file__).resolve().parent
REGIMES = ("baseline", "joint", "dssl")


@dataclass(frozen=True)
class Config:
    campaign: tyro.conf.Positional[Literal["miniature", "long"]]
    dataset: Literal["cifar10", "folder"] = "cifar10"  # a folder holds train/<class>, val/<class>
    data_root: str = str(REPOSITORY / "data")  # of CIFAR-10 (downloaded if absent), or the folder
    jobs: Positive = 2  # runs at a time
    threads: Positive = 1  # of each run; several finish one run sooner, and all of them later
    device: str = "cpu"  # of every run


def flags(**values: object) -> dict[str, object]:
    """Keyword arguments as flags: `base_lr=0.5` to `{"base-lr": 0.5}`."""
    return {name.replace("_", "-"): value for name, value in values.items()}


# ---------------------------------------------------------------- what is trained

# One recipe for every method and regime, found with SimSiam's baseline; only the heads differ.
MINIATURE = flags(
    backbone="resnet10",
    stem_stride=2,
    width=16,
    batch_size=64,
    base_lr=0.5,
    weight_decay=1e-4,
    epochs=10,
    warmup_epochs=1,
    linear_epochs=10,
    precision="fp32",  # on every processor: the runs may be spread over several
)
LONG = {
    **MINIATURE,
    **flags(width=32, batch_size=128, epochs=100, warmup_epochs=10, linear_epochs=100),
    **flags(precision="bf16"),
}
HEADS = {
    "simclr": flags(hidden_dim=512, projector_dim=128),
    "byol": flags(hidden_dim=512, projector_dim=128),
    "simsiam": flags(projector_dim=512, predictor_dim=128),
}


class Run(NamedTuple):
    """One training: its name, its experiment and its flags, the recipe's included."""

    name: str
    experiment: str
    flags: dict[str, object]


def run_of(
    recipe: dict[str, object],
    method: str,
    regime: str,
    seed: int,
    variant: str = "",
    **more: object,
) -> Run:
    """A run on CIFAR-10; `more` are flags in addition to the recipe's, `variant` names them."""
    own = {**HEADS[method], **flags(regime=regime, seed=seed, **more)}
    return Run(f"{method}{variant}-{regime}-seed{seed}", f"{method}_cifar10", {**recipe, **own})


def miniature() -> Iterator[Run]:
    """Both CIFAR-10 tables: the first seed of everything, then the other seeds."""

    def table_1(seed: int) -> Iterator[Run]:
        return (run_of(MINIATURE, method, regime, seed) for regime in REGIMES for method in HEADS)

    def table_3(seed: int) -> Iterator[Run]:
        for ops, magnitude in ((4, 10), (8, 16)):
            for regime in ("joint", "dssl"):
                heavy = {"randaug_num_ops": ops, "randaug_magnitude": magnitude}
                yield run_of(MINIATURE, "byol", regime, seed, f"-ra{ops}-{magnitude}", **heavy)

    yield from table_1(0)
    yield from table_3(0)
    for method in ("simsiam", "simclr"):
        for regime in ("joint", "dssl"):
            yield run_of(MINIATURE, method, regime, 0, "-relative", translate_relative=True)
    for table in (table_1, table_3):
        for seed in (1, 2):
            yield from table(seed)


def long() -> Iterator[Run]:
    """SimSiam at equal epochs and at equal cost, then BYOL under RandAugment(8, 16).

    A step of dssl passes four views, one of baseline two: 200 epochs of baseline cost 100 of dssl.
    """
    for seed in (0, 1):
        for regime in ("dssl", "baseline", "joint"):
            yield run_of(LONG, "simsiam", regime, seed)
        yield run_of({**LONG, "epochs": 200}, "simsiam", "baseline", seed, "-200-epochs")
    for regime in ("joint", "dssl"):
        heavy = {"randaug_num_ops": 8, "randaug_magnitude": 16}
        yield run_of(LONG, "byol", regime, 0, "-ra8-16", **heavy)


PLANS = {"miniature": miniature, "long": long}

# ---------------------------------------------------------------- how


class Campaign:
    """The runs of a plan.

    Args:
        name: of the plan. Finished runs are copied to `results/<name>`; checkpoints are kept in
            `runs/<name>` of the repository.
    """

    def __init__(self, name: str) -> None:
        self.runs = list(PLANS[name]())
        self.results = RESULTS / name
        self.folder = REPOSITORY / "runs" / name

    def command(self, run: Run, config: Config) -> list[str]:
        """The command of a run, as a user would type it."""
        flags = {
            **run.flags,
            "dataset": config.dataset,
            "data-root": config.data_root,
            "device": config.device,
            "run-dir": self.folder / run.name,
        }
        words = [sys.executable, str(REPOSITORY / run.experiment / "run.py")]
        for name, value in flags.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def is_kept(self, run: Run, dataset: str) -> bool:
        """Whether the results hold a finished run with these flags on this data set."""
        folder = self.results / run.name
        if not is_finished(folder):
            return False
        kept = json.loads((folder / "config.json").read_text())["config"]
        wanted = {**run.flags, "dataset": dataset}
        wanted.pop("precision", None)  # the oldest runs left it to a processor without bf16
        return all(kept[name.replace("-", "_")] == value for name, value in wanted.items())

    def keep(self, run: Run) -> None:
        """Copy a finished run's settings and metrics; paths of this machine are left out."""
        folder = self.results / run.name
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)  # of an earlier recipe
        settings = json.loads((self.folder / run.name / "config.json").read_text())
        for name in ("data_root", "run_dir"):
            settings["config"][name] = Path(settings["config"][name]).name
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        # Last and whole, since it says that the run is finished.
        partial = folder / "metrics.jsonl.partial"
        shutil.copy(self.folder / run.name / "metrics.jsonl", partial)
        partial.replace(metrics)

    def problem(self, process: subprocess.Popen, run: Run) -> str:
        """Why a run that has ended is not finished; empty: it is, and its logs are kept."""
        if process.returncode or not is_finished(self.folder / run.name):
            return f"see {self.folder / run.name}.log"
        try:
            self.keep(run)
        except OSError as error:  # as where the disk is full
            return f"its logs cannot be copied ({error})"
        return ""

    def main(self, config: Config) -> None:
        """Start or continue every run that is not finished, `config.jobs` at a time.

        Raises:
            StopRequested: after a signal, once every run has written its checkpoint.
            UserError: if runs failed, after all others have finished.
        """
        check_settings(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        alone = Ranks(0, 1, torch.device("cpu"))
        if config.dataset == "cifar10":
            # Two runs would both download it.
            load_cifar(config.dataset, config.data_root, IMAGE_SIZE, alone)
        waiting = [run for run in self.runs if not self.is_kept(run, config.dataset)]
        finished = len(self.runs) - len(waiting)
        print(f"{finished} of {len(self.runs)} runs are finished", flush=True)
        stop = StopFlag(alone)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment["OMP_NUM_THREADS"] = str(config.threads)
        # This checkout's code, whichever one the environment was installed from.
        paths = (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        working: dict[subprocess.Popen, Run] = {}
        failed = []
        try:
            while waiting or working:
                while waiting and len(working) < config.jobs and not stop.requested:
                    run = waiting.pop(0)
                    with (self.folder / f"{run.name}.log").open("a") as output:
                        process = subprocess.Popen(
                            self.command(run, config), stdout=output, stderr=output, env=environment
                        )
                    working[process] = run
                    print(f"{time.strftime('%H:%M')} started  {run.name}", flush=True)
                if stop.requested:
                    raise StopRequested(stop.exit_status)
                time.sleep(1)
                for process in [process for process in working if process.poll() is not None]:
                    run = working.pop(process)
                    problem = self.problem(process, run)
                    if problem:
                        failed.append(run.name)
                    end = f"FAILED   {run.name}: {problem}" if problem else f"finished {run.name}"
                    print(f"{time.strftime('%H:%M')} {end}", flush=True)
        finally:  # after an error too: no run goes on unattended
            for process in working:
                process.terminate()  # it stops after the current step, with a checkpoint
            for process in working:
                process.wait()
        if failed:
            names = ", ".join(failed)
            raise UserError(f"{len(failed)} runs failed ({names}); type the same command again")


def is_finished(folder: Path) -> bool:
    """Whether a run has written its linear accuracy, which comes last."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return False
    return any("linear" in json.loads(line) for line in metrics.read_text().splitlines())


if __name__ == "__main__":
    run_script(lambda config: Campaign(config.campaign).main(config), Config, __doc__)
