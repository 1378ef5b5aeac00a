"""How cost grows: seconds and peak memory of the views, the step and kNN.

    python benchmarks/growth.py

Each number is measured in a process of its own, because peak memory is counted for a whole process.
"grows" is the factor of the time for each doubling of the work: 2.0 means proportional.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import tyro

from common.augment.cifar10 import centre_view, normalised, standard_augmentation
from common.augment.randaugment import RandAugment
from common.dssl import loss_parts
from common.evaluation.knn import knn_predict
from common.runtime.memory import keep_freed_memory
from common.runtime.seeding import generator_for
from common.views import ViewMaker
from contest import machine
from simsiam_cifar10.loss import pair_loss
from simsiam_cifar10.model import SimSiam


@dataclass(frozen=True)
class GrowthOptions:
    rounds: int = 2
    width: int = 16  # of the step's ResNet-18
    threads: int = 1


def random_images(count: int, size: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def view_maker(size: int) -> ViewMaker:
    return ViewMaker(standard_augmentation(size), RandAugment(2, 9), "dssl")


def views_of(batch: int, size: int) -> Callable[[], object]:
    maker, images = view_maker(size), random_images(batch, size)
    return lambda: maker.make(images, maker.draw(batch, (size, size), generator_for("views", 0)))


def step_of(width: int, batch: int, size: int) -> Callable[[], object]:
    network = SimSiam("resnet18", width, 2048, 512).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    views = views_of(batch, size)()

    def step() -> None:
        optimiser.zero_grad()
        for part in loss_parts(
            network, lambda view: network(normalised(view)), views, "dssl", pair_loss, 0.1
        ):
            part.loss.backward()
        optimiser.step()

    return step


def knn_of(bank: int, queries: int) -> Callable[[], object]:
    features, labels = torch.randn(bank, 512), torch.randint(10, (bank,))
    asked = torch.randn(queries, 512)
    return lambda: knn_predict(asked, features, labels, 10)


def centre_views_of(count: int) -> Callable[[], object]:
    images = random_images(count, 32)
    return lambda: [centre_view(part) for part in images.split(500)]


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(make: Callable[[], Callable[[], object]], rounds: int, threads: int, answer) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    work = make()
    before = megabytes()
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    answer.send((statistics.median(seconds[1:]), megabytes() - before))


def main(options: GrowthOptions) -> None:
    print(f"[{machine()}; run with {options.threads} thread(s)]")
    step = partial(step_of, options.width)
    batches, sizes = (64, 128, 256, 512, 1024), (32, 64, 128, 224)
    tables = {
        "views at 32 px, by batch": {b: partial(views_of, b, 32) for b in batches},
        "views of 64 images, by size (px)": {s: partial(views_of, 64, s) for s in sizes},
        f"step at 32 px, width {options.width}, by batch": {
            b: partial(step, b, 32) for b in batches
        },
        f"step of 16 images, width {options.width}, by size (px)": {
            s: partial(step, 16, s) for s in sizes
        },
        "kNN of 1,000 queries, by bank": {
            n: partial(knn_of, n, 1000) for n in (1000, 5000, 20_000, 60_000)
        },
        "kNN in a bank of 20,000, by queries": {
            n: partial(knn_of, 20_000, n) for n in (500, 1000, 4000, 10_000)
        },
        "centre views, by data set": {
            n: partial(centre_views_of, n) for n in (1000, 5000, 20_000, 60_000)
        },
    }
    context = multiprocessing.get_context("spawn")
    for title, rows in tables.items():
        print(f"\n{title}\n  {'':>8} {'seconds':>9} {'grows':>6} {'MiB':>7}")
        previous = None
        for amount, make in rows.items():
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(
                target=measure, args=(make, options.rounds, options.threads, sending)
            )
            process.start()
            sending.close()  # so that recv fails, instead of waiting, if the process ends early
            seconds, peak = receiving.recv()
            process.join()
            grows = ""
            if previous is not None:
                work = amount / previous[0]
                doublings = math.log2(work) * (2 if "px)" in title else 1)
                grows = f"{(seconds / previous[1]) ** (1 / doublings):.2f}"
            previous = amount, seconds
            print(f"  {amount:>8} {seconds:9.4f} {grows:>6} {peak:7.0f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(GrowthOptions))
