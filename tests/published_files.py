"""Small data sets in the file formats in which CIFAR and STL-10 are published."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, cifar, stl10

STL10_NAMES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)


def put_cifar(
    dataset: str, root: Path, monkeypatch: pytest.MonkeyPatch, count: int = 24
) -> tuple[Tensor, list[int]]:
    """All files with the sums that torchvision expects; the last sixth of the images is for tests.

    Returns:
        The images uint8 `[count, 3, 32, 32]` and their labels.
    """
    classes = {"cifar10": 10, "cifar100": 100}[dataset]
    reader, fine = (CIFAR10, "") if dataset == "cifar10" else (CIFAR100, "fine_")
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    images = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator(), dtype=torch.uint8)
    labels = [(7 * index) % classes for index in range(count)]

    def put_pickled(name: str, content: dict) -> str:
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    sixth, listed, begin = count // 6, [], 0
    files = {"train": 5 * sixth, "test": sixth}
    if dataset == "cifar10":
        files = {**{f"data_batch_{number}": sixth for number in range(1, 6)}, "test_batch": sixth}
    for name, length in files.items():
        rows = slice(begin, begin + length)
        # A row holds 1024 reds, then greens, then blues, each line by line.
        content = {"data": images[rows].reshape(length, 3072).numpy()}
        content[f"{fine}labels"] = labels[rows]
        if dataset == "cifar100":
            content["coarse_labels"] = [label // 5 for label in labels[rows]]
        listed.append([name, put_pickled(name, content)])
        begin += length
    key = f"{fine}label_names"
    names = {key: [f"class {index}" for index in range(classes)]}
    if dataset == "cifar100":
        names["coarse_label_names"] = [f"group {index}" for index in range(20)]
    meta = {"filename": "meta" if fine else "batches.meta", "key": key}
    meta["md5"] = put_pickled(meta["filename"], names)
    monkeypatch.setattr(reader, "train_list", listed[:-1])
    monkeypatch.setattr(reader, "test_list", listed[-1:])
    monkeypatch.setattr(reader, "meta", meta)
    return images, labels


def put_stl10(
    root: Path, monkeypatch: pytest.MonkeyPatch, train: int = 7, unlabelled: int = 4, test: int = 5
) -> None:
    """All files with the sums that torchvision expects. Image k of a split has class 3 k mod 10."""
    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    sums = {}

    def put(name: str, content: Tensor) -> None:
        data = content.to(torch.uint8).numpy().tobytes()
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()

    generator = torch.Generator()
    for name, count in (("train", train), ("test", test), ("unlabeled", unlabelled)):
        put(f"{name}_X.bin", torch.randint(256, (count, 3, 96, 96), generator=generator))
        if name != "unlabeled":
            put(f"{name}_y.bin", 1 + 3 * torch.arange(count) % 10)  # 1..10
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in STL10_NAMES))
    (folder / "fold_indices.txt").write_text("0 1 \n")
    for listed in ("train_list", "test_list"):
        names = [name for name, _ in getattr(STL10, listed)]
        monkeypatch.setattr(STL10, listed, [[name, sums[name]] for name in names])


def forbid_downloads(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let torchvision's downloads fail."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    for module in (cifar, stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)
