"""Several ways to do the same work ("contestants"), timed in turn within one run.

The result is a ratio: absolute times depend on the machine and on what else it does. Every round
times each contestant once. A contestant's ratio is the median, over the rounds, of the first
contestant's time divided by its own.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Options:
    rounds: int = 7  # in each of them every contestant is timed once
    profile: bool = False  # show where this project's time goes instead


def machine() -> str:
    """The processor, instruction set, number of threads and torch release, in a line."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    if torch.cuda.is_available():
        name += f" with {torch.cuda.get_device_name()}"
    return (
        f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}"
    )


class Apart:
    """A contestant in a process of its own.

    Our runs tell the C library to keep freed memory (`common.runtime.memory`); the authors' scripts
    do not. This holds for a whole process: in the same one the reference would be faster too.

    Args:
        prepare: makes the contestant in that process; a module's function, or a partial of one.
    """

    def __init__(self, prepare: Callable[[], Callable[[], object]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.turns, far_end = context.Pipe()
        context.Process(target=take_turns, args=(prepare, far_end), daemon=True).start()
        far_end.close()

    def __call__(self) -> None:
        self.turns.send(None)
        self.turns.recv()  # EOFError if the process has ended


def apart(prepare: Callable[[], Callable[[], object]], options: Options) -> Callable[[], object]:
    """The contestant in a process of its own; in this one for a profile, which sees no other."""
    return prepare() if options.profile else Apart(prepare)


def take_turns(prepare: Callable[[], Callable[[], object]], turns: Connection) -> None:
    contestant = prepare()
    while True:
        try:
            turns.recv()
        except EOFError:  # the script has ended
            return
        contestant()
        turns.send(None)


def compare(
    row: str,
    contestants: Mapping[str, Callable[[], object]],
    options: Options,
    items: int = 1,
    unit: str = "image",
    core_time: bool = False,
) -> dict[str, float]:
    """Time the contestants and print how many times faster than the first each of them is.

    Args:
        row: title: what is done.
        contestants: by name; the first is the reference, the last is ours. Each is called once
            before the rounds, to warm up.
        items, unit: how many items one call processes, and what an item is called.
        core_time: count CPU time of this process instead of wall-clock time: for work of one
            thread, which other processes then disturb less.

    Returns:
        The ratio of each contestant.
    """
    if options.profile:
        show_profile(list(contestants.values())[-1])
        return {}
    clock = time.process_time if core_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(options.rounds):
        for name, call in contestants.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    first = next(iter(contestants))
    ratios = {}
    print(f"{row}  [{machine()}; {options.rounds} rounds]")
    for name, times in seconds.items():
        in_turn = [reference / own for reference, own in zip(seconds[first], times, strict=True)]
        ratios[name] = statistics.median(in_turn)
        spent = 1000 * statistics.median(times) / items
        print(
            f"  {name:<44} {ratios[name]:6.2f} ×   "
            f"({min(in_turn):.2f} to {max(in_turn):.2f}; {spent:.3f} ms/{unit})"
        )
    return ratios


def show_profile(call: Callable[[], object]) -> None:
    """Print the operations that took the most time in a call."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
