"""SimCLR with directional heavy augmentation on ImageNet (table 1 of the paper, SimCLR column).

    python run.py --data-root DIR          DSSL, 100 epochs, on every GPU of the machine
    … --regime baseline                    standard views only
    … --regime joint                       heavy views, symmetric loss

DIR holds train/<class>/*.jpg, or photographs without classes; `…` is the first command. Several
machines: docs/running.md. The same command continues a run that was stopped. Edit the settings
below, or set any of them on the command line.

The paper's authors published no script for this column. T, the projector's sizes, τ, the rule of
the learning rate, weight decay, warm-up and cosine, synchronised BatchNorm are SimCLR's published
settings (Chen et al., 2020). This project chose: batch 512 for 100 epochs, LARC in place of LARS,
on every parameter, and so is weight decay (published: not on biases and BatchNorm), no BatchNorm
after the projector (published: one), learning rates constant within an epoch, the heavy view as in
simsiam_imagenet, and the asymmetric loss in loss.py.

Cost: an epoch of dssl is four forward and backward passes of ResNet-50 over 1.28 million images of
224 px (baseline and joint: two).

Expected, linear evaluation by test_runner.py, top-1, the paper's numbers: baseline 59.5, joint
60.0, dssl 60.3. docs/measured.md says what was measured with this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common.augment.imagenet import normalised
from common.data.batches import PhotographBatches
from common.data.loader import Loading
from common.data.photographs import Dataset, RandomCrops, find_photographs
from common.dssl import loss_parts
from common.evaluation.photographs import PhotographEvaluation
from common.losses.contrastive import nt_xent
from common.networks.resnet import Depth
from common.runtime.precision import Precision
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script
from common.training.larc import LARC
from common.training.run import Run
from common.training.schedule import check_warmup, cosine
from common.training.settings import (
    BatchSize,
    Count,
    Decay,
    Dimension,
    Fraction,
    Magnitude,
    Minutes,
    NumOps,
    Pixels,
    Positive,
    Rate,
    Seed,
    Temperature,
    Workers,
)
from common.views import Regime, ViewMaker
from simclr_imagenet.augmentation import CROP_SCALE, heavy_augmentation, standard_augmentation
from simclr_imagenet.loss import pair_loss
from simclr_imagenet.model import SimCLR


@dataclass(frozen=True)
class Config:
    # data
    dataset: Dataset = "folder"  # photographs, stl10 at --image-size 96, or generated shapes
    data_root: str = str(REPOSITORY / "data" / "imagenet")  # folder or zip of photographs; STL-10
    classes: str = ""  # a file of the classes to use, one a line; default: all
    image_size: Pixels = 224  # of a view
    workers: Workers = -1  # loader processes of each rank; -1: its share of the usable cores
    prefetch: Positive = 4  # batches that each worker keeps ready
    pin_memory: bool = True  # page-locked batches, with CUDA only
    skip_broken: bool = False  # in place of a file that cannot be decoded use the next one
    # views
    regime: Regime = "dssl"  # baseline, joint ("w/ T̂") or dssl, table 1
    heavy_randaug: tuple[NumOps, Magnitude] = (2, 9)  # N M of RandAugment(N, M), the heavy view
    # model
    backbone: Depth = "resnet50"  # torchvision's
    hidden_dim: Dimension = 2048  # of the projector
    projector_dim: Dimension = 128  # d, of z
    # loss
    temperature: Temperature = 0.1  # τ, of both losses
    # optimisation: LARC over SGD
    epochs: Positive = 100  # of the whole schedule
    warmup_epochs: Count = 10  # of linear warm-up; a cosine follows
    batch_size: BatchSize = 512  # global, over all processes
    base_lr: Rate = 0.3  # for a batch of 256; scales with the batch
    momentum: Fraction = 0.9  # of SGD
    weight_decay: Decay = 1e-6  # on every parameter
    # evaluation
    knn_every: Count = 10  # epochs; 0: no kNN
    knn_images: Positive = 50  # training photographs of each class in kNN's bank
    # run
    max_steps: Count = 0  # end after this number of steps, for trials; 0: no limit
    checkpoint_minutes: Minutes = 10  # between checkpoints; each epoch ends with one
    seed: Seed = 0  # of weights, order, views and shapes
    device: str = "auto"  # auto: every CUDA GPU, else MPS, else CPU
    precision: Precision = "auto"  # bf16 where the hardware has it, else fp32
    compile: bool = False  # torch.compile the network and the views' arithmetic
    run_dir: str = ""  # default: runs/simclr_imagenet/<regime>-seed<k> in the repository
    fresh: bool = False  # start a new run; an earlier one in run_dir is moved aside


def main(config: Config) -> None:
    check_warmup(config.epochs, config.warmup_epochs)
    run = Run("simclr_imagenet", config, every_gpu=True)

    # data
    source = (config.dataset, config.data_root, config.image_size, config.seed, config.batch_size)
    found = find_photographs(*source, "pretraining", run.ranks, config.classes)
    crops = RandomCrops(found.photographs, 2, config.image_size, CROP_SCALE, config.seed)
    loading = Loading(config.workers, config.prefetch, config.pin_memory, config.skip_broken)
    batches = PhotographBatches(crops, found.fingerprint, config.batch_size, loading, run.ranks)

    # views
    heavy = heavy_augmentation(*config.heavy_randaug)
    view_maker = ViewMaker(standard_augmentation(), heavy, config.regime)

    # model
    torch.manual_seed(config.seed)
    network = SimCLR(config.backbone, config.hidden_dim, config.projector_dim)
    model = run.wrap(network)

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast():
            return model(normalised(view))

    # losses
    settings = {"temperature": config.temperature, "ranks": run.ranks}
    symmetric = partial(nt_xent, **settings)
    asymmetric = partial(pair_loss, **settings)

    # optimisation
    peak_lr = config.base_lr * config.batch_size / 256
    optimiser = LARC(network.parameters(), peak_lr, config.momentum, config.weight_decay)
    parts = {"model": network, "optimiser": optimiser}

    with run.training(parts, batches, view_maker) as training:
        evaluation = PhotographEvaluation(training, network, found, config)
        for epoch in training.epochs():
            training.set_lr(cosine(epoch - 1, config.epochs, peak_lr, config.warmup_epochs))
            for batch in training.steps(epoch):
                views = view_maker.views(batch)
                optimiser.zero_grad(set_to_none=True)
                for part in loss_parts(
                    model, forward, views, config.regime, asymmetric, symmetric_loss=symmetric
                ):
                    part.loss.backward()
                    training.add(part)
                optimiser.step()
            training.row |= evaluation.after_epoch(epoch)

    evaluation.neighbours()
    training.finish()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
