"""test_runner.py on small JPEGs: protocol, interruption, ranks, and every format of weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from PIL import Image

from common.distributed import Ranks
from common.errors import UserError
from common.image_ops import Draws, normalise
from common.linear_evaluation import MEAN, STD, load_backbone
from common.linear_probe import new_classifier
from common.photo_ops import RandomFlip
from common.photographs import CentreCrops, CropLoader, Loading, RandomCrops, list_images
from common.resnet import imagenet_resnet
from common.seeding import epoch_order, generator_for
from common.shapes import CLASS_NAMES, shapes
from scripts import command_line, run
from simsiam_imagenet.model import SimSiam

SIZE, BATCH, EPOCHS, BASE_LR, CLASSES = 28, 8, 2, 40.0, 7
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes: 21 JPEGs to train on (a last batch of 5), 17 to test."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 30), ("val", 23)):
        images, labels = shapes(count, 40, seed=len(split))
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if label < CLASSES:
                path = root / split / CLASS_NAMES[label] / f"{index:02d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone in torchvision's format, its BatchNorm averages moved from their start."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        network(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(network.state_dict(), path)
    return path


def command(folder: Path, weights: Path, run_dir: Path, *extra: str) -> list[str]:
    settings = {
        "pretrained": weights,
        "data-root": folder,
        "run-dir": run_dir,
        "backbone": "resnet18",
        "image-size": SIZE,
        "epochs": EPOCHS,
        "batch-size": BATCH,
        "base-lr": BASE_LR,
        "workers": 1,
        "device": "cpu",
    }
    return command_line("simsiam_imagenet/test_runner.py", settings, *extra)


@pytest.fixture(scope="module")
def whole(folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    done = run(command(folder, weights, run_dir))
    assert "the backbone is unchanged" in done.stdout
    return run_dir


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "linear_last.pt", weights_only=True)["classifier"]


def results(run_dir: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run_dir / "linear.jsonl").read_text().splitlines()]
    return [(row["top_1"], row["top_5"]) for row in rows]


def features(backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone.eval()(normalise(images, MEAN, STD)).double()


def larc_by_hand(
    features_and_labels: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]],
) -> list[torch.Tensor]:
    """Softmax regression under method's LARC and cosine, written out in float64."""
    classifier = new_classifier(512, CLASSES, 0)
    parameters = [classifier.weight.detach().double(), classifier.bias.detach().double()]
    momentum = [torch.zeros_like(parameter) for parameter in parameters]
    for epoch in range(EPOCHS):
        lr = BASE_LR * BATCH / 256 * 0.5 * (1 + numpy.cos(numpy.pi * epoch / EPOCHS))
        for x, y in features_and_labels(epoch):
            scores = (x @ parameters[0].T + parameters[1]).softmax(1)
            scores[torch.arange(len(y)), y] -= 1
            gradients = [scores.T @ x / len(y), scores.mean(0)]
            for parameter, gradient, velocity in zip(parameters, gradients, momentum, strict=True):
                norms = parameter.norm(), gradient.norm()
                if norms[0] > 0 and norms[1] > 0:
                    gradient = gradient * 0.001 * norms[0] / (norms[1] + 1e-8)
                velocity.mul_(0.9).add_(gradient)
                parameter.sub_(lr * velocity)
    return parameters


def assert_trained(run_dir: Path, expected: list[torch.Tensor]) -> None:
    ours = trained(run_dir)
    assert torch.allclose(ours["weight"].double(), expected[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours["bias"].double(), expected[1], rtol=1e-4, atol=1e-6)


def labels_of(files: list[Path]) -> torch.Tensor:
    names = sorted({path.parent.name for path in files})
    return torch.tensor([names.index(path.parent.name) for path in files])


def test_training_is_larc_by_hand(folder: Path, weights: Path, whole: Path) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(weights, "resnet18")
    files = list_images(folder / "train")
    crops = RandomCrops(files, 1, SIZE, (0.08, 1.0), 0, skip_broken=False)

    def views(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = CropLoader(crops, BATCH, 0, Loading(0), ALONE)
        for step, (images,), indices in loader.epoch(epoch, 0, 3):
            generator = generator_for("linear", 0, epoch, step)
            draws = RandomFlip().draw(len(images), (SIZE, SIZE), generator)
            flipped = RandomFlip().apply(images, Draws.of(draws))
            yield features(backbone, flipped), labels_of(files)[indices]

    assert_trained(whole, larc_by_hand(views))


def test_cached_features_and_knn(folder: Path, weights: Path, tmp_path: Path) -> None:
    done = run(command(folder, weights, tmp_path, "--cache-features", "--knn"))
    assert "kNN accuracy" in done.stdout
    backbone = load_backbone(weights, "resnet18")
    cached = {}
    for split in ("train", "val"):
        files = list_images(folder / split)
        views = torch.stack([CentreCrops(files, SIZE)[index][0][0] for index in range(len(files))])
        cached[split] = features(backbone, views), labels_of(files)
    x, y = cached["train"]

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in epoch_order(len(x), 0, epoch).split(BATCH):
            yield x[batch], y[batch]

    assert_trained(tmp_path, larc_by_hand(batches))

    bank = (x / x.norm(dim=1, keepdim=True)).numpy()
    right = 0
    for query, label in zip(*cached["val"], strict=True):
        cosine = bank @ (query / query.norm()).numpy()  # all 21 are within the 200 nearest
        votes = numpy.bincount(y.numpy(), weights=numpy.exp(cosine / 0.1), minlength=CLASSES)
        right += int(votes.argmax() == label)
    row = json.loads((tmp_path / "linear.jsonl").read_text())
    assert row["knn"] == pytest.approx(100 * right / 17)

    # On two ranks: nothing more to train, and the same counts.
    run([*LAUNCHER, *command(folder, weights, tmp_path, "--cache-features", "--knn")[1:]])
    again = json.loads((tmp_path / "linear.jsonl").read_text().splitlines()[1])
    for name in ("top_1", "top_5", "knn"):
        assert again[name] == pytest.approx(row[name])


def test_accuracies_are_over_the_whole_validation_set(
    folder: Path, weights: Path, whole: Path
) -> None:
    backbone = load_backbone(weights, "resnet18")
    files = list_images(folder / "val")
    names = sorted({path.parent.name for path in list_images(folder / "train")})
    classifier = {name: value.double() for name, value in trained(whole).items()}
    right = numpy.zeros(2)
    for index, path in enumerate(files):
        x = features(backbone, CentreCrops(files, SIZE)[index][0][0][None])
        scores = (x @ classifier["weight"].T + classifier["bias"])[0]
        order = scores.argsort(descending=True).tolist()
        truth = names.index(path.parent.name)
        right += [truth == order[0], truth in order[:5]]
    assert len(files) == 17
    assert results(whole)[0] == pytest.approx(tuple(100 * right / 17))


def test_typed_again_trains_no_more_and_two_ranks_count_the_same(
    folder: Path, weights: Path, whole: Path
) -> None:
    before = trained(whole)
    run([*LAUNCHER, *command(folder, weights, whole)[1:]])
    assert all(torch.equal(value, before[name]) for name, value in trained(whole).items())
    first, *others = results(whole)
    assert others
    assert all(other == pytest.approx(first, rel=1e-6) for other in others)


def test_killed_and_continued_is_the_same(
    folder: Path, weights: Path, whole: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(folder, weights, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (tmp_path / "linear_last.pt").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    run(command(folder, weights, tmp_path))
    ours, theirs = trained(tmp_path), trained(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert results(tmp_path)[-1] == results(whole)[0]


def test_every_format_of_weights_is_read(weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = SimSiam("resnet18", projector_dim=8, predictor_dim=4)
    torch.save({"model": network.state_dict(), "config": {}}, tmp_path / "last.pt")
    torch.save(network.backbone.state_dict(), tmp_path / "backbone.pt")
    expected = network.backbone.state_dict()
    for name in ("last.pt", "backbone.pt"):
        found = load_backbone(tmp_path / name, "resnet18").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    reference = torch.load(weights, weights_only=True)
    found = load_backbone(weights, "resnet18").state_dict()
    assert found.keys() == reference.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[key], reference[key]) for key in found)
    with pytest.raises(UserError, match=r"does not fit a resnet50 .*--backbone"):
        load_backbone(weights, "resnet50")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_backbone(tmp_path / "nothing.pt", "resnet18")
    assert imagenet_resnet("resnet18").feature_dim == 512
