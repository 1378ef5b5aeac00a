"""SimSiam with directional heavy augmentation on ImageNet (table 1 of the paper, SimSiam column).

    python run.py --data-root DIR          DSSL, the paper's 100 epochs, on every GPU of the machine
    python run.py --regime baseline        standard views only
    python run.py --regime joint           heavy views, symmetric loss
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST run.py …

DIR holds train/<class>/*.jpg, or photographs without classes. Typing the same command again
continues the run. Edit the header below or override any of its fields on the command line.

Cost: an epoch of dssl is four forward and backward passes of ResNet-50 over 1.28 million images of
224 px (baseline and joint: two). Expected, linear evaluation by test_runner.py, top-1, the paper's
numbers: baseline 67.4, joint collapses, dssl 68.6. README.md says what was measured with this code.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from common.augment.imagenet import CROP_SCALE, normalised, standard_augmentation
from common.data.loader import CropLoader, Loading
from common.data.photographs import RandomCrops, find_photographs
from common.dssl import loss_parts
from common.networks.resnet import Depth
from common.runtime import ranks as distributed
from common.runtime.compiler import require_compiler
from common.runtime.errors import StopRequested, require, run_script
from common.runtime.precision import Precision, autocast
from common.runtime.ranks import unwrap
from common.runtime.seeding import generator_for
from common.training.meter import Meter, require_finite
from common.training.picture import picture_views
from common.training.progress import Bar, Progress
from common.training.run_folder import REPOSITORY, RunLog
from common.training.schedule import cosine
from common.training.signals import StopFlag
from common.views import Regime, ViewMaker
from simsiam_imagenet.augmentation import heavy_augmentation
from simsiam_imagenet.loss import pull
from simsiam_imagenet.model import SimSiam


@dataclass(frozen=True)
class Config:
    # data
    dataset: Literal["folder", "shapes"] = "folder"  # photographs, or generated shapes for a try
    data_root: str = str(REPOSITORY / "data" / "imagenet")  # holds train/<class>/*, or photographs
    image_size: int = 224  # of a view, pixels
    workers: int = -1  # loader processes of each rank; -1: the machine's cores among its ranks
    prefetch: int = 4  # batches that each worker keeps ready
    pin_memory: bool = True  # page-locked batches, where a CUDA GPU trains
    skip_broken: bool = False  # in place of a file that cannot be decoded take the next
    # views
    regime: Regime = "dssl"  # baseline, joint ("w/ T̂") or dssl, table 1
    heavy_randaug: tuple[int, int] = (2, 9)  # N M of RandAugment(N, M), the heavy view
    # model
    backbone: Depth = "resnet50"  # torchvision's
    projector_dim: int = 2048  # d, of z and p
    predictor_dim: int = 512  # the predictor's bottleneck
    # loss
    reverse_weight: float = 0.0  # s, 0..1: softens the direction; dssl only
    # optimisation
    epochs: int = 100  # of the whole schedule
    batch_size: int = 512  # global, over all processes
    lr: float = 0.1  # whatever the batch; cosine, no warm-up
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # on every parameter
    # run
    max_steps: int = 0  # end after so many steps, for a try; 0: no limit
    checkpoint_minutes: float = 10  # within an epoch; each epoch ends with a checkpoint anyway
    seed: int = 0  # of weights, order and views
    device: str = "auto"  # auto: every CUDA GPU, else MPS, else CPU
    precision: Precision = "auto"  # bf16 where the hardware has it, else fp32
    compile: bool = False  # torch.compile the network and the views' arithmetic
    run_dir: str = ""  # default: runs/simsiam_imagenet/<regime>-seed<k> in the repository
    fresh: bool = False  # start anew; what lies in run_dir is moved aside


def check(config: Config) -> None:
    """Refuse settings that make no sense, before anything is loaded or moved."""
    for name, least in (("epochs", 1), ("prefetch", 1), ("max_steps", 0), ("seed", 0)):
        given = getattr(config, name)
        require(given >= least, f"--{name.replace('_', '-')} is {least} or more, not {given}")
    require(0 <= config.lr < math.inf, f"--lr is finite, 0 or more, not {config.lr}")
    require(0 <= config.reverse_weight <= 1, "--reverse-weight lies in 0..1")


def main(config: Config) -> None:
    # ---------------------------------------------------------------- setup
    check(config)
    distributed.use_every_gpu(config.device)
    ranks = distributed.start(config.device)
    device = ranks.device
    if config.compile:
        require_compiler(device)
    rows = ranks.share(config.batch_size)
    require(config.batch_size >= 2 * ranks.world_size, "--batch-size: BatchNorm needs 2 a process")
    view_maker = ViewMaker(
        standard_augmentation(), heavy_augmentation(*config.heavy_randaug), config.regime
    )

    # ---------------------------------------------------------------- data
    name = f"{config.regime}-seed{config.seed}"
    run_dir = Path(config.run_dir or REPOSITORY / "runs" / "simsiam_imagenet" / name)
    log = RunLog(run_dir, asdict(config), config.fresh, ranks)
    saved = log.load_checkpoint()
    photographs = find_photographs(
        config.dataset, config.data_root, config.image_size, config.seed, config.batch_size, "train"
    ).photographs
    crops = RandomCrops(
        photographs, 2, config.image_size, CROP_SCALE, config.seed, config.skip_broken
    )
    loading = Loading(config.workers, config.prefetch, config.pin_memory)
    loader = CropLoader(crops, config.batch_size, config.seed, loading, ranks)
    steps_per_epoch = len(photographs) // config.batch_size
    last_step = config.epochs * steps_per_epoch
    if config.max_steps:
        last_step = min(last_step, config.max_steps)

    # ---------------------------------------------------------------- model
    torch.manual_seed(config.seed)
    network = SimSiam(config.backbone, config.projector_dim, config.predictor_dim)
    model = ranks.wrap(network.to(memory_format=torch.channels_last))
    network = unwrap(model)
    if config.compile:
        network.compile()

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(config.precision, device):
            return model(normalised(view))

    # ---------------------------------------------------------------- optimiser
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )

    # ---------------------------------------------------------------- resume
    progress = Progress(epoch=1)
    if saved is not None:
        progress = Progress(**saved["progress"])
        progress.check_images(len(photographs))
        network.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
    progress.images = len(photographs)
    log.open(saved["metrics_bytes"] if saved else 0, progress.epoch)
    meter = Meter(ranks, progress.sums, progress.step)

    def save(*, must: bool = False) -> None:
        meter.flush()  # a loss that is not finite ends the run here, before the checkpoint
        require_finite(network)
        ranks.broadcast_buffers(network)
        progress.step, progress.sums = meter.steps, meter.sums
        state = {"model": network.state_dict(), "optimiser": optimiser.state_dict()}
        log.save({**state, "progress": asdict(progress)}, must=must)

    # ---------------------------------------------------------------- train
    last_epoch = -(-last_step // steps_per_epoch)
    size = (config.image_size, config.image_size)
    if saved is None and ranks.is_main:
        log.picture(picture_views(*crops.examples(view_maker)))
    if config.compile:  # after the picture, for whose few images it would not pay
        view_maker.compile()
    stop = StopFlag(ranks)
    bar = Bar(last_step, progress.steps(steps_per_epoch), ranks)
    try:
        for epoch in range(progress.epoch, last_epoch + 1):
            lr = cosine(epoch - 1, config.epochs, config.lr)
            optimiser.param_groups[0]["lr"] = lr
            steps = min(steps_per_epoch, last_step - (epoch - 1) * steps_per_epoch)
            bar.start_epoch()
            last_save = time.monotonic()
            for step, (first, second), _ in loader.epoch(epoch, meter.steps, steps):
                generator = generator_for("views", config.seed, epoch, step)
                draws = view_maker.draw(config.batch_size, size, generator)
                views = view_maker.make(first, draws[rows], second)

                optimiser.zero_grad(set_to_none=True)
                for part in loss_parts(
                    model, forward, views, config.regime, pull, config.reverse_weight
                ):
                    part.loss.backward()
                    meter.add({"loss": part.loss.detach(), **part.log})
                optimiser.step()

                due = time.monotonic() - last_save > 60 * config.checkpoint_minutes
                last_save = time.monotonic() if due else last_save
                meter.end_step({"stop": stop.requested, "checkpoint": due and ranks.is_main})
                bar.step(epoch, meter.latest, config.batch_size)
                if meter.take_request("stop"):
                    raise StopRequested(stop.exit_status)
                if meter.take_request("checkpoint"):
                    save()

            meter.flush()
            row = {**meter.means(), "lr": lr, "images_per_second": bar.images_per_second}
            if steps < steps_per_epoch:
                save(must=True)  # --max-steps ends within the epoch; a higher one goes on from here
            log.write(epoch, row)
            log.tell_epoch(epoch, last_epoch, row)
            if steps == steps_per_epoch:
                progress.epoch, meter = epoch + 1, Meter(ranks, {}, 0)
                save(must=epoch == last_epoch)
    except StopRequested:
        save(must=True)
        ranks.wait()  # torchrun ends the others as soon as one has left
        raise
    finally:
        bar.close()

    # ---------------------------------------------------------------- result
    ranks.broadcast_buffers(network)
    log.save_file("backbone.pt", network.backbone.state_dict(), must=True)
    log.tell_result(progress, linear=None)
    log.close()
    distributed.finish()


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
