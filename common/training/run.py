"""What surrounds a training script: processes, device, run folder and last checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.batches import Batches
from common.networks.batch_norm import convert
from common.runtime import launch
from common.runtime.compiler import compile_in_place, options, require_compiler
from common.runtime.errors import require
from common.runtime.precision import autocast
from common.runtime.repository import REPOSITORY
from common.training.checkpoint import Stateful
from common.training.config_json import defaults_of
from common.training.run_folder import RunLog
from common.training.settings import check_settings
from common.training.training import RunConfig, Training
from common.views import ViewMaker


class Run:
    """A run of an experiment: checks its settings, starts its processes, opens its folder.

    Args:
        experiment: the name of its folder in the repository, and in `runs/`.
        config: a dataclass of plain values.
        every_gpu: use every GPU of the machine where `--device` names none (by starting again
            under torchrun).

    Raises:
        UserError: for a setting outside its range, a device that is missing, a batch that the
            processes cannot share, a folder that cannot be used, or a checkpoint of another run.
    """

    def __init__(self, experiment: str, config: RunConfig, *, every_gpu: bool = False) -> None:
        check_settings(config)
        if every_gpu:
            launch.use_every_gpu(config.device)
        self.config = config
        self.ranks = launch.start(config.device)
        self.device = self.ranks.device
        if config.compile:
            require_compiler(self.device)
        self.ranks.share(config.batch_size)
        require(
            config.batch_size >= 2 * self.ranks.world_size,
            "--batch-size must be at least 2 for each process: BatchNorm needs two images",
        )
        default = REPOSITORY / "runs" / experiment / f"{config.regime}-seed{config.seed}"
        folder = Path(config.run_dir or default)
        require_outside(folder, config.dataset, Path(config.data_root))
        settings = (asdict(config), defaults_of(config))
        self.log = RunLog(folder, *settings, config.fresh, self.ranks)
        self.saved: dict[str, Any] | None = self.log.load_checkpoint()

    def wrap(self, network: nn.Module, *, sync_batch_norm: bool = True) -> nn.Module:
        """Move a network to the device (channels last), compile it if asked; DDP around it.

        On CUDA its BatchNorm layers are replaced, in place, by `common.networks.batch_norm`'s. On a
        CPU each process normalises with the statistics of its own images.

        Args:
            sync_batch_norm: on CUDA, use the statistics of all processes' images.
        """
        if self.device.type == "cuda":
            convert(network, synchronised=sync_batch_norm)
        model = self.ranks.wrap(network.to(memory_format=torch.channels_last))
        self.compile(network)
        return model

    def compile(self, *modules: nn.Module) -> None:
        """With `--compile`, compile modules in place."""
        if self.config.compile:
            compile_in_place(self.device, *modules)

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """With `--compile` a compiled function, otherwise the function itself."""
        if not self.config.compile:
            return function
        return torch.compile(function, options=options(self.device))

    def autocast(self) -> torch.autocast:
        """The context for forward passes, of the requested precision."""
        return autocast(self.config.precision, self.device)

    def training(
        self, parts: Mapping[str, Stateful], batches: Batches, view_maker: ViewMaker
    ) -> Training:
        """The bookkeeping of the run's steps, continued from the last checkpoint if there is one.

        Args:
            parts: what a checkpoint holds, by name: the network as "model" (with a `backbone`,
                which has a `feature_dim`), the optimiser as "optimiser", and whatever else changes
                with the steps.
            batches: the images.
            view_maker: whose views are drawn into views.png, and compiled with `--compile`.
        """
        saved, self.saved = self.saved, None  # its memory is free once it is restored
        return Training(self.config, self.ranks, self.log, saved, parts, batches, view_maker)


def require_outside(folder: Path, dataset: str, data_root: Path) -> None:
    """Refuse a run folder among the training images: the pictures in it would be trained on.

    Raises:
        UserError: if `folder` is inside the training images of `--dataset folder`.
    """
    if dataset != "folder":
        return
    with suppress(OSError):  # of a folder that must not be read; told where it is listed
        images = data_root / "train" if (data_root / "train").is_dir() else data_root
        require(
            not images.is_dir()
            or not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(images)),
            f"--run-dir {folder} is inside {images}, so its pictures would be trained on in "
            "a later run; choose a --run-dir outside it",
        )
