"""One training step of simsiam_cifar10 and of byol_cifar10, dssl, ResNet-18 at 32 px.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --curves --batch-size 32 --width 16    # losses of 200 steps

The reference is a step as in the authors' scripts: float32, contiguous memory, all forward passes,
then one backward pass; BYOL's targets are computed twice. Ours is the step of `run.py`: channels
last, a backward pass for each part of the loss, targets computed once, bf16 where the processor
multiplies it, freed memory kept by the process.

`--curves` trains simsiam_cifar10 on generated shapes and prints each step's loss: the reference's,
ours in float32, ours in bf16 (which is emulated, slowly, on a processor without it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from torch import Tensor, nn

import byol_cifar10.loss
import simsiam_cifar10.loss
from byol_cifar10.model import online_network
from common.augment.cifar10 import IMAGE_SIZE, normalised, standard_augmentation
from common.augment.randaugment import RandAugment
from common.data.shapes import shapes
from common.dssl import loss_parts, own_projection
from common.networks.ema import make_target, update
from common.runtime.memory import keep_freed_memory
from common.runtime.precision import Precision, autocast, has_native_bf16
from common.runtime.seeding import generator_for
from common.views import ViewMaker, Views
from contest import Options, apart, compare
from simsiam_cifar10.model import SimSiam

CPU = torch.device("cpu")
Step = Callable[[Views], float]
PairLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepOptions(Options):
    rounds: int = 5
    batch_size: int = 128
    threads: int = 2
    width: int = 64  # channels of the first stage
    curves: bool = False  # print the losses of 200 steps instead


def optimiser(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)


def simsiam_as_the_authors(network: nn.Module) -> Step:
    sgd, pair_loss, s = optimiser(network), simsiam_cifar10.loss.pair_loss, 0.1

    def step(views: Views) -> float:
        (p_1, z_1), (p_2, z_2), (p_3, z_3), (p_4, z_4) = (network(view) for view in views)
        loss = pair_loss(p_1, z_2) + pair_loss(p_2, z_1)
        loss = loss + (1 - s) * (pair_loss(p_3, z_1) + pair_loss(p_4, z_2))
        loss = loss + s * (pair_loss(p_1, z_3) + pair_loss(p_2, z_4))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return loss.item()

    return step


def byol_as_the_authors(network: nn.Module) -> Step:
    sgd, target, pair_loss = optimiser(network), make_target(network), byol_cifar10.loss.pair_loss

    def step(views: Views) -> float:
        (p_1, _), (p_2, _), (p_3, _), (p_4, _) = (network(view) for view in views)
        with torch.no_grad():
            xi_1, xi_2 = target.project(views[0]), target.project(views[1])
        loss = pair_loss(p_1, xi_2) + pair_loss(p_2, xi_1)
        with torch.no_grad():
            xi_1, xi_2 = target.project(views[0]), target.project(views[1])
        loss = loss + pair_loss(p_3, xi_1) + pair_loss(p_4, xi_2)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        update(target, network, 0.99)
        return loss.item()

    return step


def ours(
    network: nn.Module,
    pair_loss: PairLoss,
    reverse_weight: float,
    has_target: bool,
    precision: Precision = "auto",
) -> Step:
    network = network.to(memory_format=torch.channels_last)
    target_network = make_target(network) if has_target else None
    sgd = optimiser(network)

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(precision, CPU):
            return network(view.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def target(view: Tensor, z: Tensor) -> Tensor:
        with autocast(precision, CPU):
            return target_network.project(view.contiguous(memory_format=torch.channels_last))

    def step(views: Views) -> float:
        loss = 0.0
        sgd.zero_grad()
        parts = loss_parts(
            network,
            forward,
            views,
            "dssl",
            pair_loss,
            reverse_weight,
            target if has_target else own_projection,
        )
        for part in parts:
            part.loss.backward()
            loss += part.loss.item()
        sgd.step()
        if target_network is not None:
            update(target_network, network, 0.99)
        return loss

    return step


def simsiam_network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return SimSiam("resnet18", width, 2048, 512)


def byol_network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return online_network("resnet18", width, 4096, 256)


def prepare_theirs(
    options: StepOptions,
    network: Callable[[int], nn.Module],
    as_the_authors: Callable[[nn.Module], Step],
) -> Callable[[], float]:
    return partial(as_the_authors(network(options.width)), random_views(options))


def prepare_ours(
    options: StepOptions, network: Callable[[int], nn.Module], as_we: Callable[[nn.Module], Step]
) -> Callable[[], float]:
    keep_freed_memory()  # as every run on a CPU does
    return partial(as_we(network(options.width)), random_views(options))


def random_views(options: StepOptions) -> Views:
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    size = (options.batch_size, 3, 32, 32)
    return Views(*(torch.randn(size, generator=generator) for _ in range(4)))


def main(options: StepOptions) -> None:
    torch.set_num_threads(options.threads)
    if options.curves:
        print_curves(options)
        return
    name_of_ours = "this project, bf16" if has_native_bf16(CPU) else "this project (no bf16 here)"
    contests = {
        "simsiam_cifar10": (
            simsiam_network,
            simsiam_as_the_authors,
            partial(
                ours, pair_loss=simsiam_cifar10.loss.pair_loss, reverse_weight=0.1, has_target=False
            ),
        ),
        "byol_cifar10": (
            byol_network,
            byol_as_the_authors,
            partial(
                ours, pair_loss=byol_cifar10.loss.pair_loss, reverse_weight=0.0, has_target=True
            ),
        ),
    }
    for name, (network, as_the_authors, as_we) in contests.items():
        theirs = partial(prepare_theirs, options, network, as_the_authors)
        contestants = {
            "as the authors: fp32, contiguous, one backward": apart(theirs, options),
            name_of_ours: apart(partial(prepare_ours, options, network, as_we), options),
        }
        row = f"a step of {name}, dssl, width {options.width}, batch {options.batch_size}"
        compare(row, contestants, options, items=options.batch_size)


def print_curves(options: StepOptions) -> None:
    """simsiam_cifar10's losses over 200 steps, on the same views, by the three."""
    keep_freed_memory()
    pair_loss = simsiam_cifar10.loss.pair_loss
    contestants = [simsiam_as_the_authors(simsiam_network(options.width))]
    for precision in ("fp32", "bf16"):
        contestants.append(ours(simsiam_network(options.width), pair_loss, 0.1, False, precision))
    print("simsiam_cifar10: step, loss as the authors, ours in fp32, ours in bf16")
    for step, views in enumerate(views_of_shapes(200, options.batch_size)):
        print(step, *(f"{contestant(views):.5f}" for contestant in contestants), flush=True)


def views_of_shapes(steps: int, batch_size: int) -> Iterator[Views]:
    """Normalised views `[batch_size, 3, 32, 32]` of generated shapes, other ones each step."""
    images, _ = shapes(steps * batch_size, IMAGE_SIZE, seed=0)
    maker = ViewMaker(standard_augmentation(), RandAugment(2, 9), "dssl")
    for step, batch in enumerate(images.split(batch_size)):
        draws = maker.draw(batch_size, (IMAGE_SIZE, IMAGE_SIZE), generator_for("views", 0, step))
        yield Views(*(normalised(view).contiguous() for view in maker.make(batch, draws)))


if __name__ == "__main__":
    main(tyro.cli(StepOptions))
