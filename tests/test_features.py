"""features.py: its numbers by Pillow and torchvision, several processes, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import STL10
from torchvision.transforms.v2 import functional as transforms

import features
from common.augment.cifar10 import centre_view, normalised
from common.data.in_memory import ImageSet, Split
from common.data.photographs import PhotographSet
from common.data.shapes import CLASS_NAMES, shapes
from common.evaluation import feature_batches
from common.networks.resnet import CifarResNet
from common.runtime.errors import StopRequested, UserError
from common.runtime.ranks import Ranks
from processes import files, in_child, limit_files_to, on_two_ranks
from published_files import forbid_downloads, put_stl10

SIZE, BROKEN = 28, 5  # 28 is cut out of 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 JPEGs of several sizes in class folders, and one that is broken."""
    root = tmp_path_factory.mktemp("photographs")
    images, labels = shapes(22, 40, seed=0)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = root / CLASS_NAMES[label] / f"{index:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40 + index, 50 - index))
        picture.save(path, quality=95)
    sorted(root.rglob("*.jpg"))[BROKEN].write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As MoCo writes them, of a ResNet that is not torchvision's initial one."""
    network = torchvision_s()
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "moco.pth"
    torch.save({"epoch": 200, "state_dict": state}, path)
    return path


def torchvision_s() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        network(torch.randn(16, 3, 32, 32))
    network.fc = nn.Identity()
    return network.eval()


def settings(folder: Path, weights: Path, output: Path, **other: object) -> features.Config:
    values = {
        "pretrained": str(weights),
        "output": str(output),
        "data_root": str(folder),
        "image_size": SIZE,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
    }
    return features.Config(**{**values, **other})


def written(output: Path) -> dict[str, np.ndarray]:
    with np.load(output, allow_pickle=False) as file:
        return dict(file)


def by_hand(paths: list[Path], view: Callable[[Image.Image], Tensor], network: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([network(view(Image.open(path).convert("RGB"))[None]) for path in paths])


def evaluation_view(picture: Image.Image) -> Tensor:
    image = transforms.pil_to_tensor(picture)[None].to(memory_format=torch.channels_last)
    height, width = transforms.resize(image, [32]).shape[2:]
    # torchvision resizes in float32, which torch 2.6 rounds otherwise than uint8.
    resized = F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]
    pixels = transforms.center_crop(resized, [SIZE, SIZE])
    return transforms.normalize(pixels.float() / 255, MEAN, STD)


def test_features_of_another_project_s_backbone(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "features.npz"
    features.main(settings(folder, weights, output, skip_broken=True))
    file = written(output)
    broken, paths = None, sorted(folder.rglob("*.jpg"))
    broken = paths.pop(BROKEN)
    assert file["paths"].tolist() == [str(path.relative_to(folder)) for path in paths]
    classes = sorted({path.parent.name for path in [*paths, broken]})
    assert file["class_names"].tolist() == classes
    assert file["labels"].dtype == np.int64
    assert file["labels"].tolist() == [classes.index(path.parent.name) for path in paths]
    expected = by_hand(paths, evaluation_view, torchvision_s())
    assert file["features"].dtype == np.float32
    assert torch.allclose(torch.from_numpy(file["features"]), expected, rtol=1e-4, atol=1e-5)
    assert files(output.parent) == ["features.npz"]
    printed = capsys.readouterr().out
    assert f"Left out 1 broken files: {broken.relative_to(folder)}\n" in printed
    assert f"Written: 21 features of 512 numbers, {output}\n" in printed


def small_view(picture: Image.Image) -> Tensor:
    """Of kNN on CIFAR-10: to 32 px, then to 36, of which the centre is cut out."""
    side = min(picture.size)
    width, height = (int(32 * length / side) for length in picture.size)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    square = picture.resize((width, height), Image.BICUBIC).crop((left, top, left + 32, top + 32))
    pixels = transforms.pil_to_tensor(square.resize((36, 36), Image.BICUBIC).crop((2, 2, 34, 34)))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return transforms.normalize(pixels.float() / 255, mean, std)


def test_features_of_a_backbone_for_32_px(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = CifarResNet("resnet10", width=16, stem_stride=2).eval()
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save({"model": state, "config": {"stem_stride": 2}}, tmp_path / "last.pt")
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.jpg"):
        (flat / path.name).symlink_to(path)
    options = {"image_size": 224, "skip_broken": True}
    features.main(settings(flat, tmp_path / "last.pt", tmp_path / "features.npz", **options))
    file = written(tmp_path / "features.npz")
    assert file.keys() == {"features", "paths"}  # no class folders, no labels
    expected = by_hand([flat / name for name in file["paths"]], small_view, network)
    # Where torch rounds a pixel otherwise than Pillow, it is 1 of 255 off.
    error = torch.from_numpy(file["features"]) - expected
    assert error.norm() < 2e-3 * expected.norm()
    with pytest.raises(UserError, match=r"takes images of 32 px: leave out --image-size"):
        features.main(settings(flat, tmp_path / "last.pt", tmp_path / "more.npz"))


def write_in_rounds(ranks: Ranks) -> None:
    """On two ranks rounds of 8, 8 and 6: the last one has 3 photographs of each."""
    feature_batches.EVALUATION_BATCH = 4
    features.main(features.Config(**torch.load(os.environ["SETTINGS"])))


def test_two_processes_write_the_same_file(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = settings(folder, weights, tmp_path / "alone.npz", skip_broken=True)
    features.main(alone)
    torch.save({**vars(alone), "output": str(tmp_path / "two.npz")}, tmp_path / "settings.pt")
    monkeypatch.setenv("SETTINGS", str(tmp_path / "settings.pt"))
    on_two_ranks(write_in_rounds, tmp_path)
    one, two = written(tmp_path / "alone.npz"), written(tmp_path / "two.npz")
    assert one.keys() == two.keys()
    for name in ("paths", "labels", "class_names"):
        assert (one[name] == two[name]).all()
    assert np.allclose(one["features"], two["features"], rtol=1e-5, atol=1e-6)


def test_nothing_is_overwritten_or_half_written(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.npz"
    taken.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"taken\.npz exists already; choose another --output"):
        features.main(settings(folder, weights, taken))
    assert taken.read_bytes() == b"mine"
    with pytest.raises(UserError, match="--stem-stride is only for backbones of 32 px"):
        features.main(settings(folder, weights, tmp_path / "new.npz", stem_stride=2))
    with pytest.raises(UserError, match=r"has to end with \.npz"):
        features.main(settings(folder, weights, tmp_path / "features.npy"))
    with pytest.raises(UserError, match=r"new\.npz cannot be written .*; choose another --output"):
        features.main(settings(folder, weights, taken / "new.npz"))
    with pytest.raises(UserError, match=r"cannot be decoded .* --skip-broken"):
        features.main(settings(folder, weights, tmp_path / "new.npz"))

    def on_a_full_disk() -> str:
        limit_files_to(20_000)
        with pytest.raises(UserError) as raised:
            features.main(settings(folder, weights, tmp_path / "new.npz", skip_broken=True))
        return str(raised.value)

    monkeypatch.setattr(features.tempfile, "tempdir", str(tmp_path))
    assert re.search(r"new\.npz cannot be written .*, nor can .*new\.npz", in_child(on_a_full_disk))
    room = features.shutil.disk_usage(tmp_path)._replace(free=22 * 512 * 4)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: room)
    with pytest.raises(UserError, match=r"the features take 0\.0 GB and .* has 0\.0 GB free"):
        features.main(settings(folder, weights, tmp_path / "new.npz", skip_broken=True))
    assert files(tmp_path) == ["taken.npz"]


def test_a_name_or_a_folder_that_is_lost_meanwhile_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The features took hours, and are there."""
    found = PhotographSet([], [], (), "", names=["a.png", "b.png"])
    numbers = torch.arange(6.0).view(2, 3)
    output, elsewhere = tmp_path / "new.npz", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(features.tempfile, "tempdir", str(elsewhere))
    output.write_bytes(b"mine")
    features.write(output, numbers, [0, 1], found)
    assert output.read_bytes() == b"mine"
    features.write(tmp_path / "gone" / "new.npz", numbers, [0, 1], found)
    said = capsys.readouterr().out
    for place in (tmp_path / "new.npz.1", elsewhere / "new.npz.1"):
        assert f", {place}\n" in said
        with np.load(place) as file:
            assert file["features"].tolist() == numbers.tolist()
            assert file["paths"].tolist() == ["a.png", "b.png"]


def test_a_signal_ends_it_without_a_file(
    folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_batches, "EVALUATION_BATCH", 4)
    encoded = []

    def with_signal(images: Tensor) -> Tensor:
        encoded.append(len(images))
        os.kill(os.getpid(), signal.SIGTERM)
        return images

    monkeypatch.setattr(features.imagenet, "normalised", lambda x: with_signal(x).float())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(StopRequested, match="the same command extracts them again") as raised:
            features.main(settings(folder, weights, tmp_path / "new.npz", skip_broken=True))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert raised.value.exit_status == 128 + signal.SIGTERM
    assert encoded == [4]
    assert files(tmp_path) == []


def test_another_split(folder: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(folder)
    (tmp_path / "data" / "val" / "b\udcff").mkdir(parents=True)  # no UTF-8
    some = min(folder.rglob("*.jpg"))
    (tmp_path / "data" / "val" / "b\udcff" / "x.jpg").write_bytes(some.read_bytes())
    data = settings(tmp_path / "data", weights, tmp_path / "val.npz", split="val")
    features.main(data)
    file = written(tmp_path / "val.npz")
    assert file["paths"].tolist() == ["b\udcff/x.jpg"]
    assert (file["labels"].tolist(), file["class_names"].tolist()) == ([0], ["b\udcff"])


def test_cifar10(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = shapes(7, 32, seed=1)
    test = ImageSet(images, labels, CLASS_NAMES, "7 images, checksum 00000000")
    train = ImageSet(images[:0], labels[:0], CLASS_NAMES)
    monkeypatch.setattr(features, "load_images", lambda *source: Split(train, test))
    network = CifarResNet("resnet10", width=8).eval()
    torch.save(network.state_dict(), tmp_path / "backbone.pt")
    options = {"dataset": "cifar10", "split": "val", "image_size": 32}
    features.main(settings(tmp_path, tmp_path / "backbone.pt", tmp_path / "new.npz", **options))
    file = written(tmp_path / "new.npz")
    assert file["paths"].tolist() == [f"val {index}" for index in range(7)]
    assert file["labels"].tolist() == labels.tolist()
    with torch.no_grad():
        expected = network(normalised(centre_view(images)))
    assert torch.allclose(torch.from_numpy(file["features"]), expected, rtol=1e-4, atol=1e-6)


def test_stl10(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_stl10(tmp_path, monkeypatch)
    forbid_downloads(monkeypatch, AssertionError("everything is there"))
    options = {"dataset": "stl10", "split": "val"}
    features.main(settings(tmp_path, weights, tmp_path / "new.npz", **options))
    file = written(tmp_path / "new.npz")
    assert file["labels"].tolist() == [0, 3, 6, 9, 2]
    assert file["paths"].tolist() == [f"val {index}" for index in range(5)]
    pictures = [image for image, _ in STL10(str(tmp_path), "test")]
    with torch.no_grad():
        expected = torchvision_s()(torch.stack([evaluation_view(image) for image in pictures]))
    assert torch.allclose(torch.from_numpy(file["features"]), expected, rtol=1e-4, atol=1e-5)
