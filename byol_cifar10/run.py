"""BYOL with directional heavy augmentation on CIFAR-10 (tables 1 and 2 of the paper, BYOL columns).

    python run.py                          DSSL, 800 epochs; downloads CIFAR-10
    python run.py --regime baseline        standard views only
    python run.py --regime joint           heavy views, symmetric loss
    python run.py --randaug-num-ops 4 --randaug-magnitude 10      table 2; 8 and 16 likewise
    torchrun --nproc-per-node 2 run.py     several processes; the batch stays the global one

Typing the same command again continues the run. Edit the header below or override any of its
fields on the command line.

The authors published no script for these columns. Data, views, backbone, optimisation and
evaluation are those of simsiam_cifar10, heads and target network those of
byol_harder_aug_imagenet: this project's choice.

Cost: an epoch of dssl is four forward and backward passes of ResNet-18 over 50,000 images of
32 px (baseline and joint: two) and two forward passes of the target network. Expected, linear
evaluation, top-1, the paper's numbers: baseline 92.2, joint 94.4, dssl 94.7; under
RandAugment(4, 10) joint 84.1, dssl 94.4; under RandAugment(8, 16) joint collapses, dssl 94.0. None
of them was measured with this code.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from byol_cifar10.augmentation import heavy_augmentation
from byol_cifar10.loss import pull
from byol_cifar10.model import online_network
from common.augment.cifar10 import IMAGE_SIZE, normalised, standard_augmentation
from common.data.in_memory import Dataset, load_images
from common.dssl import loss_parts
from common.evaluation.in_memory import Evaluation
from common.networks.ema import make_target, update
from common.networks.resnet import CifarDepth
from common.runtime import ranks as distributed
from common.runtime.compiler import require_compiler
from common.runtime.errors import StopRequested, require, run_script
from common.runtime.precision import Precision, autocast
from common.runtime.ranks import unwrap
from common.runtime.seeding import epoch_order, generator_for
from common.training.meter import Meter, require_finite
from common.training.picture import PICTURED, picture_views
from common.training.progress import Bar, Progress
from common.training.run_folder import REPOSITORY, RunLog
from common.training.schedule import warmup_cosine
from common.training.signals import StopFlag
from common.views import Regime, ViewMaker


@dataclass(frozen=True)
class Config:
    # data
    dataset: Dataset = "cifar10"  # cifar10, a folder of images, or generated shapes
    data_root: str = str(REPOSITORY / "data")  # where CIFAR-10 lies or is put; the image folder
    skip_broken: bool = False  # leave out image files that cannot be decoded
    # views
    regime: Regime = "dssl"  # baseline, joint ("w/ T̂") or dssl, table 1
    randaug_num_ops: int = 2  # N of RandAugment(N, M), the heavy view
    randaug_magnitude: int = 9  # M, 0..30
    translate_relative: bool = False  # by M/30 · 100/224 of the side, not M/30 · 100 px
    # model
    backbone: CifarDepth = "resnet18"  # with the stem for 32 px
    width: int = 64  # channels of the backbone's first stage, a multiple of 8
    stem_stride: int = 1  # of the first convolution; 2 for trials, at a quarter of the cost
    hidden_dim: int = 4096  # of projector and predictor
    projector_dim: int = 256  # d, of z and p
    ema_decay: float = 0.99  # of the target network's parameters, after each step
    # optimisation
    epochs: int = 800  # of the whole schedule
    warmup_epochs: int = 10  # of linear warm-up; a cosine follows
    batch_size: int = 512  # global, over all processes
    base_lr: float = 0.03  # for a batch of 256; scales with the batch
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # on every parameter
    # evaluation
    knn_every: int = 1  # epochs; 0: only at the end
    linear_epochs: int = 100  # linear evaluation at the end; 0: none
    # run
    max_steps: int = 0  # end after so many steps, for a try; 0: no limit
    checkpoint_minutes: float = 10  # within an epoch; each epoch ends with a checkpoint anyway
    seed: int = 0  # of weights, order, views and shapes
    device: str = "auto"  # auto: CUDA, else MPS, else CPU
    precision: Precision = "auto"  # bf16 where the hardware has it, else fp32
    compile: bool = False  # torch.compile the network and the views' arithmetic
    run_dir: str = ""  # default: runs/byol_cifar10/<regime>-seed<k> in the repository
    fresh: bool = False  # start anew; what lies in run_dir is moved aside


def check(config: Config) -> None:
    """Refuse settings that make no sense, before anything is loaded or moved."""
    for name in ("knn_every", "linear_epochs", "max_steps", "seed"):
        require(getattr(config, name) >= 0, f"--{name.replace('_', '-')} is 0 or more")
    require(0 <= config.ema_decay <= 1, "--ema-decay lies in 0..1")
    require(0 <= config.base_lr < math.inf, f"--base-lr is finite, 0 or more, not {config.base_lr}")
    require(config.epochs >= 2, "--epochs is 2 or more: in the last one the learning rate is 0")
    require(
        0 <= config.warmup_epochs < config.epochs,
        f"--warmup-epochs {config.warmup_epochs} must lie below --epochs {config.epochs}",
    )


def main(config: Config) -> None:
    # ---------------------------------------------------------------- setup
    check(config)
    ranks = distributed.start(config.device)
    device = ranks.device
    if config.compile:
        require_compiler(device)
    rows = ranks.share(config.batch_size)
    require(config.batch_size >= 2 * ranks.world_size, "--batch-size: BatchNorm needs 2 a process")
    heavy = heavy_augmentation(
        config.randaug_num_ops, config.randaug_magnitude, config.translate_relative
    )
    view_maker = ViewMaker(standard_augmentation(), heavy, config.regime)

    # ---------------------------------------------------------------- model
    torch.manual_seed(config.seed)
    heads = (config.hidden_dim, config.projector_dim)
    network = online_network(config.backbone, config.width, *heads, config.stem_stride)
    model = ranks.wrap(network.to(memory_format=torch.channels_last))
    network = unwrap(model)
    target_network = make_target(network)
    if config.compile:
        network.compile()
        target_network.backbone.compile()
        target_network.projector.compile()

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(config.precision, device):
            return model(normalised(view))

    @torch.no_grad()
    def target(view: Tensor, z: Tensor) -> Tensor:
        with autocast(config.precision, device):
            return target_network.project(normalised(view))  # ξ

    # ---------------------------------------------------------------- data
    name = f"{config.regime}-seed{config.seed}"
    run_dir = Path(config.run_dir or REPOSITORY / "runs" / "byol_cifar10" / name)
    log = RunLog(run_dir, asdict(config), config.fresh, ranks)
    saved = log.load_checkpoint()
    source = (config.dataset, config.data_root, IMAGE_SIZE, config.seed, config.skip_broken)
    train, test = load_images(*source, config.batch_size, ranks)
    train, test = train.to(device), test and test.to(device)
    steps_per_epoch = len(train) // config.batch_size
    last_step = config.epochs * steps_per_epoch
    if config.max_steps:
        last_step = min(last_step, config.max_steps)
    stop = StopFlag(ranks)

    # ---------------------------------------------------------------- optimiser
    peak_lr = config.base_lr * config.batch_size / 256
    optimiser = torch.optim.SGD(
        model.parameters(), lr=peak_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    parts = {"model": network, "target": target_network, "optimiser": optimiser}  # of a checkpoint

    # ---------------------------------------------------------------- resume
    progress = Progress()
    if saved is not None:
        progress = Progress(**saved["progress"])
        progress.check_images(len(train))
        for key, module in parts.items():
            module.load_state_dict(saved[key])
    progress.images = len(train)
    log.open(saved["metrics_bytes"] if saved else 0, progress.epoch)
    meter = Meter(ranks, progress.sums, progress.step)

    def save(*, must: bool = False) -> None:
        meter.flush()  # a loss that is not finite ends the run here, before the checkpoint
        require_finite(network)
        ranks.broadcast_buffers(network)
        ranks.broadcast_buffers(target_network)
        progress.step, progress.sums = meter.steps, meter.sums
        state = {key: module.state_dict() for key, module in parts.items()}
        log.save({**state, "progress": asdict(progress)}, must=must)

    # ---------------------------------------------------------------- train
    last_epoch = -(-last_step // steps_per_epoch)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    evaluation = Evaluation(
        network, train, test, config.precision, config.seed, progress, log, stop
    )
    bar = Bar(last_step, progress.steps(steps_per_epoch), ranks)
    try:
        if progress.epoch == 0:
            shown = train.images[:PICTURED]
            draws = view_maker.draw(len(shown), size, generator_for("picture", config.seed))
            log.picture(picture_views(shown, view_maker.make(shown, draws)))
            evaluation.before_training()
            progress.epoch = 1
            save()

        if config.compile:  # after the picture, for whose few images it would not pay
            view_maker.compile()
        for epoch in range(progress.epoch, last_epoch + 1):
            lr = warmup_cosine(epoch, config.epochs, config.warmup_epochs, peak_lr)
            optimiser.param_groups[0]["lr"] = lr
            order = epoch_order(len(train), config.seed, epoch).to(device)
            steps = min(steps_per_epoch, last_step - (epoch - 1) * steps_per_epoch)
            bar.start_epoch()
            last_save = time.monotonic()
            for step in range(meter.steps, steps):
                batch = order[step * config.batch_size : (step + 1) * config.batch_size]
                generator = generator_for("views", config.seed, epoch, step)
                draws = view_maker.draw(config.batch_size, size, generator)
                views = view_maker.make(train.images[batch[rows]], draws[rows])

                optimiser.zero_grad(set_to_none=True)
                for part in loss_parts(model, forward, views, config.regime, pull, target=target):
                    part.loss.backward()
                    meter.add({"loss": part.loss.detach(), **part.log})
                optimiser.step()
                update(target_network, network, config.ema_decay)

                due = time.monotonic() - last_save > 60 * config.checkpoint_minutes
                last_save = time.monotonic() if due else last_save
                meter.end_step({"stop": stop.requested, "checkpoint": due and ranks.is_main})
                bar.step(epoch, meter.latest, config.batch_size)
                if meter.take_request("stop"):
                    raise StopRequested(stop.exit_status)
                if meter.take_request("checkpoint"):
                    save()

            meter.flush()
            require_finite(network)
            row = {**meter.means(), "lr": lr, "images_per_second": bar.images_per_second}
            is_whole = steps == steps_per_epoch
            if not is_whole:
                save(must=True)  # --max-steps ends within the epoch; a higher one goes on from here
            is_evaluated = config.knn_every and epoch % config.knn_every == 0
            if is_evaluated or epoch == last_epoch:
                row |= evaluation.after_epoch(epoch, is_whole=is_whole)
            log.write(epoch, row)
            log.tell_epoch(epoch, last_epoch, row)
            if is_whole:
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
    linear = evaluation.linear(config.linear_epochs, last_epoch, steps_per_epoch, save)
    log.tell_result(progress, linear)
    log.close()
    distributed.finish()


if __name__ == "__main__":
    run_script(main, tyro.cli(Config, description=__doc__))
