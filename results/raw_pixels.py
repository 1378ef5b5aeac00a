"""kNN accuracy of CIFAR-10's raw pixels: a trained network should be better than this.

    python results/raw_pixels.py
    python results/raw_pixels.py --dataset folder --data-root DIR

kNN is measured as in every run (k = 200, the whole training set, cosine similarity): on the pixels
as stored, 0..255 ("as stored"), and normalised as the networks' input is ("centred").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from common.augment.cifar10 import IMAGE_SIZE, centre_view, normalised
from common.data.in_memory import load_images
from common.evaluation.knn import knn_predict
from common.runtime.errors import require
from common.runtime.ranks import Ranks
from common.runtime.repository import REPOSITORY
from common.runtime.script import run_script


@dataclass(frozen=True)
class Config:
    dataset: Literal["cifar10", "folder"] = "cifar10"  # a folder holds train/<class>, val/<class>
    data_root: str = str(REPOSITORY / "data")  # of CIFAR-10 (downloaded if absent), or the folder


def main(config: Config) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    train, test = load_images(config.dataset, config.data_root, IMAGE_SIZE, 0, False, 1, ranks)
    require(test is not None, "--data-root: a folder needs labels and a val/ folder")
    for name, as_features in (("as stored", torch.Tensor.float), ("centred", normalised)):
        # The evaluation's view, so that pixels and networks see the same.
        views = (as_features(centre_view(images.images)) for images in (train, test))
        bank, queries = (view.flatten(1) for view in views)
        predictions = knn_predict(queries, bank, train.labels, len(train.class_names))
        accuracy = 100 * (predictions == test.labels).float().mean().item()
        print(f"raw pixels, {name}: kNN {accuracy:.1f} %")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
