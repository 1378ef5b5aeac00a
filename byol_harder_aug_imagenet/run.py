"""BYOL under harder heavy augmentation on ImageNet (table 3 of the paper, ImageNet column).

    python run.py --data-root DIR                              DSSL, T̂ with RandAugment(8, 16)
    … --regime joint                                           heavy views, symmetric loss
    … --regime baseline --standard-randaug 0 0                 tables 1 and 3: plain T
    … --standard-randaug 0 0 --heavy-randaug 2 9 --no-heavy-crop                  table 1: dssl

DIR holds train/<class>/*.jpg, or photographs without classes; `…` is the first command. Several
machines: docs/running.md. The same command continues a run that was stopped. Edit the settings
below, or set any of them on the command line.

Cost: an epoch of dssl is four forward and backward passes of ResNet-50 over 1.28 million images of
224 px (baseline and joint: two), and two forward passes of the target network.

Expected, linear evaluation by test_runner.py, top-1, the paper's numbers: baseline 67.8, joint
60.6, dssl 67.8 (table 1: 67.8, 68.3, 68.3). None of them was measured with this code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from byol_harder_aug_imagenet.augmentation import (
    CROP_SCALE,
    heavy_augmentation,
    standard_augmentation,
    whole_augmentation,
)
from byol_harder_aug_imagenet.loss import pair_loss
from byol_harder_aug_imagenet.model import online_network
from common.augment.imagenet import normalised
from common.data.batches import PhotographBatches
from common.data.loader import Loading
from common.data.photographs import Dataset, RandomCrops, find_photographs
from common.dssl import loss_parts
from common.evaluation.photographs import PhotographEvaluation
from common.networks.ema import make_target, update
from common.networks.resnet import Depth
from common.runtime.precision import Precision
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script
from common.training.run import Run
from common.training.schedule import cosine
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
    Workers,
)
from common.views import Regime, ViewMaker


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
    standard_randaug: tuple[Count, Magnitude] = (2, 9)  # N M, on the whole photograph; 0 0: plain T
    heavy_randaug: tuple[NumOps, Magnitude] = (8, 16)  # N M of RandAugment(N, M), the heavy view
    heavy_crop: bool = True  # second crop, colours, blur and GridShuffle in the heavy view
    # model
    backbone: Depth = "resnet50"  # torchvision's
    hidden_dim: Dimension = 4096  # of projector and predictor
    projector_dim: Dimension = 256  # d, of z and p
    ema_decay: Fraction = 0.99  # of the target network's parameters, after each step
    # optimisation
    epochs: Positive = 100  # of the whole schedule
    batch_size: BatchSize = 512  # global, over all processes
    lr: Rate = 0.1  # does not scale with the batch; cosine, no warm-up
    momentum: Fraction = 0.9  # of SGD
    weight_decay: Decay = 1e-4  # on every parameter
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
    run_dir: str = ""  # default: runs/byol_harder_aug_imagenet/<regime>-seed<k> in the repository
    fresh: bool = False  # start a new run; an earlier one in run_dir is moved aside


def main(config: Config) -> None:
    run = Run("byol_harder_aug_imagenet", config, every_gpu=True)

    # data
    source = (config.dataset, config.data_root, config.image_size, config.seed, config.batch_size)
    found = find_photographs(*source, "pretraining", run.ranks, config.classes)
    whole = whole_augmentation(*config.standard_randaug)
    size = (config.image_size, CROP_SCALE)
    crops = RandomCrops(found.photographs, 2, *size, config.seed, whole)
    loading = Loading(config.workers, config.prefetch, config.pin_memory, config.skip_broken)
    batches = PhotographBatches(crops, found.fingerprint, config.batch_size, loading, run.ranks)

    # views
    heavy = heavy_augmentation(*config.heavy_randaug, config.image_size, config.heavy_crop)
    view_maker = ViewMaker(standard_augmentation(), heavy, config.regime)

    # model
    torch.manual_seed(config.seed)
    network = online_network(config.backbone, config.hidden_dim, config.projector_dim)
    model = run.wrap(network)
    loss = run.compiled(pair_loss)
    target_network = make_target(network)
    run.compile(target_network.backbone, target_network.projector)

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast():
            return model(normalised(view))

    @torch.no_grad()
    def target(view: Tensor, z: Tensor) -> Tensor:
        with run.autocast():
            return target_network.project(normalised(view))  # ξ

    # optimisation
    optimiser = torch.optim.SGD(
        network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    parts = {"model": network, "target": target_network, "optimiser": optimiser}

    with run.training(parts, batches, view_maker) as training:
        evaluation = PhotographEvaluation(training, network, found, config)
        for epoch in training.epochs():
            training.set_lr(cosine(epoch - 1, config.epochs, config.lr))
            for batch in training.steps(epoch):
                views = view_maker.views(batch)
                optimiser.zero_grad(set_to_none=True)
                for part in loss_parts(model, forward, views, config.regime, loss, target=target):
                    part.loss.backward()
                    training.add(part)
                optimiser.step()
                update(target_network, network, config.ema_decay)
            training.row |= evaluation.after_epoch(epoch)

    evaluation.neighbours()
    training.finish()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
