"""SimSiam with directional heavy augmentation on CIFAR-10 (table 1 of the paper, SimSiam column).

    python run.py                          DSSL, the paper's 800 epochs; downloads CIFAR-10
    python run.py --regime baseline        standard views only
    python run.py --regime joint           heavy views, symmetric loss
    torchrun --nproc-per-node 2 run.py     several processes; --batch-size is the global batch

The same command continues a run that was stopped. Edit the settings below, or set any of them on
the command line.

Cost: an epoch of dssl is four forward and backward passes of ResNet-18 over 50,000 images of 32 px
(baseline and joint: two).

Expected, linear evaluation, top-1, the paper's numbers: baseline 92.1, joint collapses, dssl 94.5.
docs/measured.md says what was measured with this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.augment.cifar10 import IMAGE_SIZE, normalised
from common.data.batches import ImageBatches
from common.data.in_memory import Dataset, load_images
from common.dssl import loss_parts
from common.evaluation.in_memory import Evaluation
from common.networks.resnet import CifarDepth
from common.runtime.errors import require
from common.runtime.precision import Precision
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script
from common.training.run import Run
from common.training.schedule import check_warmup, warmup_cosine
from common.training.settings import (
    BatchSize,
    Count,
    Decay,
    Dimension,
    Fraction,
    Magnitude,
    Minutes,
    NumOps,
    Positive,
    Rate,
    Seed,
    Width,
)
from common.views import Regime, ViewMaker
from simsiam_cifar10.augmentation import heavy_augmentation, standard_augmentation
from simsiam_cifar10.loss import pair_loss
from simsiam_cifar10.model import SimSiam


@dataclass(frozen=True)
class Config:
    # data
    dataset: Dataset = "cifar10"  # cifar10, cifar100, a folder of images, or generated shapes
    data_root: str = str(REPOSITORY / "data")  # of CIFAR (downloaded if absent); a folder or zip
    skip_broken: bool = False  # leave out image files that cannot be decoded
    # views
    regime: Regime = "dssl"  # baseline, joint ("w/ T̂") or dssl, table 1
    randaug_num_ops: NumOps = 2  # N of RandAugment(N, M), the heavy view
    randaug_magnitude: Magnitude = 9  # M, 0..30
    translate_relative: bool = False  # translate by M/30 · 100/224 of the side, not M/30 · 100 px
    # model
    backbone: CifarDepth = "resnet18"  # with the stem for 32 px
    width: Width = 64  # channels of the backbone's first stage, a multiple of 8
    stem_stride: Literal[1, 2] = 1  # of the first convolution; 2: a quarter of the cost, for trials
    projector_dim: Dimension = 2048  # d, of z and p
    predictor_dim: Dimension = 512  # the predictor's bottleneck
    # loss
    reverse_weight: Fraction = 0.1  # s, 0..1: softens the direction (soft_loss_rate); dssl only
    # optimisation
    epochs: Positive = 800  # of the whole schedule, at least 2
    warmup_epochs: Count = 10  # of linear warm-up; a cosine follows
    batch_size: BatchSize = 512  # global, over all processes
    base_lr: Rate = 0.03  # for a batch of 256; scales with the batch
    momentum: Fraction = 0.9  # of SGD
    weight_decay: Decay = 5e-4  # on every parameter
    # evaluation
    knn_every: Count = 1  # epochs; 0: only before training and at the end
    linear_epochs: Count = 100  # of the linear evaluation at the end; 0: none
    # run
    max_steps: Count = 0  # end after this number of steps, for trials; 0: no limit
    checkpoint_minutes: Minutes = 10  # between checkpoints; each epoch ends with one
    seed: Seed = 0  # of weights, order, views and shapes
    device: str = "auto"  # auto: CUDA, else MPS, else CPU
    precision: Precision = "auto"  # bf16 where the hardware has it, else fp32
    compile: bool = False  # torch.compile the network and the views' arithmetic
    run_dir: str = ""  # default: runs/simsiam_cifar10/<regime>-seed<k> in the repository
    fresh: bool = False  # start a new run; an earlier one in run_dir is moved aside


def main(config: Config) -> None:
    check_warmup(config.epochs, config.warmup_epochs, least_epochs=2)
    require(
        config.regime == "dssl" or config.reverse_weight == Config.reverse_weight,
        "--reverse-weight has an effect in the dssl regime only",
    )
    run = Run("simsiam_cifar10", config)

    # data
    source = (config.dataset, config.data_root, IMAGE_SIZE, config.seed, config.skip_broken)
    data = load_images(*source, config.batch_size, run.ranks).to(run.device)
    batches = ImageBatches(data.train, config.batch_size, config.seed, run.ranks)

    # views
    heavy = heavy_augmentation(
        config.randaug_num_ops, config.randaug_magnitude, config.translate_relative
    )
    view_maker = ViewMaker(standard_augmentation(), heavy, config.regime)

    # model
    torch.manual_seed(config.seed)
    heads = (config.projector_dim, config.predictor_dim)
    network = SimSiam(config.backbone, config.width, *heads, config.stem_stride)
    model = run.wrap(network)
    loss = run.compiled(pair_loss)

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast():
            return model(normalised(view))

    # optimisation
    peak_lr = config.base_lr * config.batch_size / 256
    optimiser = torch.optim.SGD(
        network.parameters(), peak_lr, config.momentum, weight_decay=config.weight_decay
    )
    parts = {"model": network, "optimiser": optimiser}

    with run.training(parts, batches, view_maker) as training:
        evaluation = Evaluation(training, network, data)
        evaluation.before_training()
        for epoch in training.epochs():
            training.set_lr(warmup_cosine(epoch, config.epochs, config.warmup_epochs, peak_lr))
            for batch in training.steps(epoch):
                views = view_maker.views(batch)
                optimiser.zero_grad(set_to_none=True)
                for part in loss_parts(
                    model, forward, views, config.regime, loss, config.reverse_weight
                ):
                    part.loss.backward()
                    training.add(part)
                optimiser.step()
            training.row |= evaluation.after_epoch(epoch, config.knn_every)

    evaluation.neighbours()
    training.finish(evaluation.linear(config.linear_epochs))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
