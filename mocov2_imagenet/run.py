"""MoCo v2 with directional heavy augmentation on ImageNet (table 1 of the paper, MoCo v2 column).

    python run.py --data-root DIR          DSSL, 100 epochs, on every GPU of the machine
    … --regime baseline                    standard views only
    … --regime joint                       heavy views, symmetric loss

DIR holds train/<class>/*.jpg, or photographs without classes; `…` is the first command. Several
machines: docs/running.md. The same command continues a run that was stopped. Edit the settings
below, or set any of them on the command line.

The paper's authors published no script for this column. T, projector, τ, queue, EMA decay, batch,
optimiser and cosine are MoCo v2's published settings (Chen et al., 2020), and so is the shuffled
BatchNorm of 32 images, here on one GPU as on eight. This project chose: 100 epochs, learning rates
constant within an epoch, the heavy view as in simsiam_imagenet, the asymmetric loss in loss.py.

Cost: an epoch of dssl is three forward and backward passes of ResNet-50 over 1.28 million images of
224 px and two forward passes of the key network (baseline and joint: one and one).

Expected, linear evaluation by test_runner.py, top-1, the paper's numbers: baseline 64.4, joint
64.2, dssl 65.3. docs/measured.md says what was measured with this code.
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
from common.networks.ema import make_target, update
from common.networks.queue import KeyQueue
from common.networks.resnet import Depth
from common.runtime.errors import require
from common.runtime.precision import Precision
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script
from common.runtime.seeding import generator_for
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
    Temperature,
    Workers,
)
from common.views import Regime, ViewMaker
from mocov2_imagenet.augmentation import CROP_SCALE, heavy_augmentation, standard_augmentation
from mocov2_imagenet.loss import pair_loss
from mocov2_imagenet.model import MoCo, ShuffledKeys, checked_norm_batch


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
    projector_dim: Dimension = 128  # d, of queries and keys
    norm_batch: BatchSize = 32  # images that share BatchNorm's statistics; below the batch
    ema_decay: Fraction = 0.999  # of the key network's parameters, before each step's keys
    queue_length: Positive = 65_536  # keys that are negatives
    # loss
    temperature: Temperature = 0.2  # τ, of both losses
    # optimisation
    epochs: Positive = 100  # of the whole schedule
    batch_size: BatchSize = 256  # global, over all processes
    lr: Rate = 0.03  # does not scale with the batch; cosine, no warm-up
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
    run_dir: str = ""  # default: runs/mocov2_imagenet/<regime>-seed<k> in the repository
    fresh: bool = False  # start a new run; an earlier one in run_dir is moved aside


def main(config: Config) -> None:
    require(
        config.queue_length >= config.batch_size,
        f"--queue-length must be at least --batch-size, {config.batch_size}",
    )
    run = Run("mocov2_imagenet", config, every_gpu=True)
    norm_batch = checked_norm_batch(config.norm_batch, config.batch_size, run.ranks)

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
    network = MoCo(config.backbone, config.hidden_dim, config.projector_dim, norm_batch)
    queue = KeyQueue(config.queue_length, config.projector_dim).to(run.device)
    model = run.wrap(network, sync_batch_norm=False)
    key_network = make_target(network)
    run.compile(key_network.backbone, key_network.projector)

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast():
            return model(normalised(view))

    def key_pass(view: Tensor) -> Tensor:
        with run.autocast():
            return key_network.project(normalised(view))

    # loss
    query_loss = partial(pair_loss, queue=queue.keys, temperature=config.temperature)

    # optimisation
    optimiser = torch.optim.SGD(
        network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    parts = {"model": network, "keys": key_network, "queue": queue, "optimiser": optimiser}

    with run.training(parts, batches, view_maker) as training:
        evaluation = PhotographEvaluation(training, network, found, config)
        for epoch in training.epochs():
            training.set_lr(cosine(epoch - 1, config.epochs, config.lr))
            for batch in training.steps(epoch):
                views = view_maker.views(batch)
                update(key_network, network, config.ema_decay)
                order = torch.randperm(batch.count, generator=generator_for("keys", *batch.key))
                keys = ShuffledKeys(key_pass, order, run.ranks)
                optimiser.zero_grad(set_to_none=True)
                for part in loss_parts(
                    model, forward, views, config.regime, query_loss, target=keys.of, one_sided=True
                ):
                    part.loss.backward()
                    training.add(part)
                optimiser.step()
                queue.push(keys.second)
            training.row |= evaluation.after_epoch(epoch)

    evaluation.neighbours()
    training.finish()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
