"""test_runner.py on small JPEGs: protocol, interruption, ranks, and every format of weights."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from PIL import Image

from common.augment.base import Draws
from common.augment.crop import RandomFlip
from common.augment.imagenet import normalised
from common.data.folder import list_images
from common.data.loader import CropLoader, Loading
from common.data.photographs import CentreCrops, RandomCrops
from common.data.shapes import CLASS_NAMES, shapes
from common.evaluation import feature_batches
from common.evaluation import test_runner as linear_evaluation
from common.evaluation.accuracy import count_right
from common.evaluation.classifier import Classifiers, new_classifier
from common.evaluation.feature_batches import cached_batches, cropped_batches, steps_of
from common.evaluation.pretrained import load_backbone
from common.evaluation.test_runner import Config, fit
from common.runtime.errors import StopRequested, UserError
from common.runtime.ranks import Ranks
from common.runtime.seeding import epoch_order, generator_for
from common.training.checkpoint import Checkpoints
from common.training.lock import FolderLock
from common.training.signals import StopFlag
from processes import in_child
from scripts import assert_equal, command_line, kill, on_two_ranks, run, start_until, state

SIZE, BATCH, EPOCHS, BASE_LR, CLASSES = 28, 8, 2, 40.0, 7
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


def trained(run_dir: Path, kind: str = "linear") -> dict[str, torch.Tensor]:
    return torch.load(run_dir / f"{kind}_last.pt", weights_only=True)["classifier"]


def results(run_dir: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run_dir / "linear.jsonl").read_text().splitlines()]
    return [(row["top_1"], row["top_5"]) for row in rows]


def features(backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone.eval()(normalised(images)).double()


def larc_by_hand(
    features_and_labels: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]],
    base_lr: float = BASE_LR,
) -> list[torch.Tensor]:
    """Softmax regression under method's LARC and cosine, written out in float64."""
    classifier = new_classifier(512, CLASSES, 0)
    parameters = [classifier.weight.detach().double(), classifier.bias.detach().double()]
    momentum = [torch.zeros_like(parameter) for parameter in parameters]
    for epoch in range(EPOCHS):
        lr = base_lr * BATCH / 256 * 0.5 * (1 + numpy.cos(numpy.pi * epoch / EPOCHS))
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


def assert_trained(run_dir: Path, expected: list[torch.Tensor], kind: str = "linear") -> None:
    ours = trained(run_dir, kind)
    assert torch.allclose(ours["weight"].double(), expected[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(ours["bias"].double(), expected[1], rtol=1e-4, atol=1e-6)


def labels_of(files: list[Path]) -> torch.Tensor:
    names = sorted({path.parent.name for path in files})
    return torch.tensor([names.index(path.parent.name) for path in files])


def centre_crops(split: Path, weights: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Features float64 `[N, 512]` and labels of a split's evaluation views."""
    files = list_images(split)
    views = torch.stack([CentreCrops(files, SIZE)[index][0][0] for index in range(len(files))])
    return features(load_backbone(weights, "resnet18"), views), labels_of(files)


def batches_of(
    x: torch.Tensor, y: torch.Tensor, ranks: int = 1
) -> Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """An epoch's batches in float64; of the last as many as divide among the ranks."""

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in epoch_order(len(x), 0, epoch).split(BATCH):
            batch = batch[: len(batch) // ranks * ranks]
            yield x[batch].double(), y[batch]

    return batches


def test_training_is_larc_by_hand(folder: Path, weights: Path, whole: Path) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(weights, "resnet18")
    files = list_images(folder / "train")
    crops = RandomCrops(files, 1, SIZE, (0.08, 1.0), 0)

    def views(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = CropLoader(crops, BATCH, Loading(0), ALONE)
        for step, (images,), indices in loader.epoch(epoch, 0, 3):
            generator = generator_for("linear", 0, epoch, step)
            draws = RandomFlip().draw(len(images), (SIZE, SIZE), generator)
            flipped = RandomFlip().apply(images, Draws.of(draws))
            yield features(backbone, flipped), labels_of(files)[indices]

    assert_trained(whole, larc_by_hand(views))


def test_cached_features_and_knn(folder: Path, weights: Path, tmp_path: Path) -> None:
    done = run(command(folder, weights, tmp_path, "--cache-features", "--knn"))
    assert "kNN accuracy" in done.stdout
    x, y = centre_crops(folder / "train", weights)
    assert_trained(tmp_path, larc_by_hand(batches_of(x, y)), "cached")
    assert not (tmp_path / "linear_last.pt").exists()  # the protocol's stays apart

    bank = (x / x.norm(dim=1, keepdim=True)).numpy()
    right = 0
    for query, label in zip(*centre_crops(folder / "val", weights), strict=True):
        cosine = bank @ (query / query.norm()).numpy()  # all 21 are within the 200 nearest
        votes = numpy.bincount(y.numpy(), weights=numpy.exp(cosine / 0.1), minlength=CLASSES)
        right += int(votes.argmax() == label)
    row = json.loads((tmp_path / "linear.jsonl").read_text())
    assert row["knn"] == pytest.approx(100 * right / 17)

    # On two ranks: nothing more to train, and the same counts.
    run(on_two_ranks(command(folder, weights, tmp_path, "--cache-features", "--knn")))
    again = json.loads((tmp_path / "linear.jsonl").read_text().splitlines()[-1])
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
    written = (whole / "linear_last.pt").stat().st_mtime_ns
    run(command(folder, weights, whole, "--knn"))  # measures more, trains nothing
    assert (whole / "linear_last.pt").stat().st_mtime_ns == written
    run(on_two_ranks(command(folder, weights, whole)))
    assert all(torch.equal(value, before[name]) for name, value in trained(whole).items())
    first, *others = results(whole)
    assert others
    assert all(other == pytest.approx(first, rel=1e-6) for other in others)


def test_killed_and_continued_is_the_same(
    folder: Path, weights: Path, whole: Path, tmp_path: Path
) -> None:
    kill(start_until(command(folder, weights, tmp_path), tmp_path / "linear_last.pt"))
    assert state(tmp_path, "linear_last.pt")["epoch"] < EPOCHS, "killed too late"
    run(command(folder, weights, tmp_path))
    ours, theirs = trained(tmp_path), trained(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert results(tmp_path)[-1] == results(whole)[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_in_pieces_is_the_same(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = shapes(21, 40, seed=0)
    config = Config("", image_size=SIZE, batch_size=BATCH, workers=0)
    most = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        most.append(len(images))
        return images.flatten(1).double()

    def epoch(at_once: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        monkeypatch.setattr(feature_batches, "EVALUATION_BATCH", at_once)
        ranks = Ranks(rank, 2, ALONE.device)
        stop = StopFlag(ALONE)
        return list(cropped_batches(list(images), labels, encode, config, ranks, stop)(1, 1))

    whole = epoch(256)
    assert most == [4, 2]  # a rank's half of the steps 1 and 2, of 8 and of 5 photographs
    pieces = epoch(3)
    assert most[2:] == [3, 1, 2]
    assert [step for step, _, _ in pieces] == [step for step, _, _ in whole] == [1, 2]
    for ours, theirs in zip(pieces, whole, strict=True):
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])


def test_a_last_batch_that_the_ranks_cannot_share_is_no_step() -> None:
    config = Config("", batch_size=BATCH)
    both = Ranks(0, 2, ALONE.device)
    assert [steps_of(count, config, both) for count in (16, 17, 18)] == [2, 2, 3]
    assert [steps_of(count, config, ALONE) for count in (16, 17)] == [2, 3]


def test_an_unfinished_classifier_is_not_overwritten(
    folder: Path, weights: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = state(whole, "linear_last.pt")
    unfinished["epoch"] = 1
    torch.save(unfinished, tmp_path / "linear_last.pt")
    before = (tmp_path / "linear_last.pt").read_bytes()
    other = tmp_path / "other.pt"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), other)
    with pytest.raises(UserError, match=r"unfinished classifier of other weights; choose another"):
        evaluate(folder, other, tmp_path)
    # kNN alone trains no classifier and leaves it there.
    evaluate(folder, weights, tmp_path, epochs=0, knn=True)
    assert (tmp_path / "linear_last.pt").read_bytes() == before
    with monkeypatch.context() as patch:  # told before any feature is extracted
        patch.setattr(linear_evaluation, "centre_features", None)
        with pytest.raises(UserError, match="batch_size was 8, now 16"):
            evaluate(folder, weights, tmp_path, batch_size=16)
    done = run(command(folder, weights, tmp_path, "--batch-size", "16", "--seed", "3"), status=1)
    assert "error:" in done.stderr
    assert "batch_size was 8, now 16; seed was 0, now 3" in done.stderr
    assert "remove these to train a new one" in done.stderr
    assert (tmp_path / "linear_last.pt").read_bytes() == before


@pytest.mark.parametrize("extra", [[], ["--knn", "--epochs", "0"]])
def test_photographs_without_classes_are_told_at_once(
    extra: list[str], folder: Path, weights: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    (flat / "train").symlink_to(folder / "train")
    for path in list_images(folder / "val"):
        (flat / "val" / path.name).write_bytes(path.read_bytes())
    stray = min(path.name for path in (flat / "val").iterdir())
    done = run(command(flat, weights, tmp_path / "run", *extra), status=1)
    assert done.stderr.strip() == (
        f"error: {flat} needs train/<class>/* and val/<class>/*, and val/{stray} is in no class "
        "folder"
    )


def test_a_broken_evaluation_file_is_told_whatever_is_skipped(
    folder: Path, weights: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    file = list_images(damaged / "val")[3]
    file.write_bytes(b"no picture")
    done = run(command(damaged, weights, tmp_path / "run", "--skip-broken"), status=1)
    assert f"{file} cannot be decoded" in done.stderr
    assert "restore the file or remove it, or if it is a training image" in done.stderr


def evaluate(folder: Path, weights: Path, run_dir: Path, **settings: object) -> None:
    """The script in this process."""
    values = {
        "pretrained": str(weights),
        "data_root": str(folder),
        "run_dir": str(run_dir),
        "backbone": "resnet18",
        "image_size": SIZE,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "base_lr": BASE_LR,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
    }
    linear_evaluation.main(Config(**{**values, **settings}))


def test_one_process_at_a_time_trains_a_classifier_in_a_folder(
    folder: Path, weights: Path, tmp_path: Path
) -> None:
    lock = FolderLock(tmp_path, ".linear.lock")
    message = in_child(lambda: raised_by(lambda: evaluate(folder, weights, tmp_path)))
    assert message == (
        f"another process is using {tmp_path}; wait for its end, or choose another --run-dir"
    )
    # The other kinds have files of their own.
    rates = (1.0, 2.0)
    swept = in_child(lambda: raised_by(lambda: evaluate(folder, weights, tmp_path, sweep=rates)))
    assert swept == ""
    lock.release()


def raised_by(function: Callable[[], None]) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


def test_a_classifier_that_an_older_version_began(
    folder: Path, weights: Path, whole: Path, tmp_path: Path
) -> None:
    """It did not know --momentum."""
    unfinished = {**state(whole, "linear_last.pt"), "epoch": 1}
    del unfinished["identity"]["momentum"]
    torch.save(unfinished, tmp_path / "linear_last.pt")
    with pytest.raises(UserError, match=r"settings: momentum was 0\.9, now 0\.5\. Repeat"):
        evaluate(folder, weights, tmp_path, momentum=0.5)
    evaluate(folder, weights, tmp_path)
    continued = state(tmp_path, "linear_last.pt")
    assert continued["epoch"] == EPOCHS
    # The second epoch was trained, on the finished weights that the file has.
    assert not torch.equal(continued["classifier"]["weight"], trained(whole)["weight"])


def test_another_data_set_of_the_same_numbers_trains_its_own_classifier(
    folder: Path, weights: Path, whole: Path, tmp_path: Path
) -> None:
    """As the folds of a cross-validation: two classes change their names."""
    other, run_dir = tmp_path / "other", tmp_path / "run"
    shutil.copytree(folder, other)
    for split in ("train", "val"):
        first, second = other / split / CLASS_NAMES[0], other / split / CLASS_NAMES[1]
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
    shutil.copytree(whole, run_dir)
    evaluate(other, weights, run_dir)
    evaluate(other, weights, tmp_path / "new")
    ours, theirs, before = trained(run_dir), trained(tmp_path / "new"), trained(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(ours["weight"], before["weight"])
    unfinished = state(run_dir, "linear_last.pt")
    unfinished["epoch"] = 1
    torch.save(unfinished, run_dir / "linear_last.pt")
    with pytest.raises(UserError, match=r"images was '21 images, .*', now '21 images, .*remove"):
        evaluate(folder, weights, run_dir)


def test_classes_and_files_that_do_not_match_are_named(
    folder: Path, weights: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "val" / CLASS_NAMES[2]).rename(tmp_path / "set" / "val" / "yak")
    with pytest.raises(UserError, match=r"^val/ has 1 classes that .* do not have: yak$"):
        evaluate(tmp_path / "set", weights, tmp_path / "run")
    shutil.copy(list_images(folder / "val")[0], tmp_path / "set" / "train" / "stray.jpg")
    with pytest.raises(UserError, match=r"and train/stray\.jpg is in no class folder$"):
        evaluate(tmp_path / "set", weights, tmp_path / "run")


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[Path, int]:
    """The folder with one broken training file, the last of its class, and its index."""
    shutil.copytree(folder, tmp_path / "damaged")
    files = list_images(tmp_path / "damaged" / "train")
    index = next(k for k in range(20) if files[k].parent != files[k + 1].parent)
    files[index].write_bytes(b"no picture")
    return tmp_path / "damaged", index


def test_skip_broken_reaches_cached_features_and_knn(
    damaged: tuple[Path, int],
    folder: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next file takes the place of the broken one, with its own label."""
    root, index = damaged
    settings = {"cache_features": True, "knn": True}
    with pytest.raises(UserError, match=r"cannot be decoded .* repeat .* with --skip-broken$"):
        evaluate(root, weights, tmp_path / "run", **settings)
    capsys.readouterr()
    evaluate(root, weights, tmp_path / "run", skip_broken=True, **settings)
    assert "replaced by the next ones: 1 (" in capsys.readouterr().out
    x, y = centre_crops(folder / "train", weights)
    assert y[index] != y[index + 1]
    x[index], y[index] = x[index + 1], y[index + 1]
    assert_trained(tmp_path / "run", larc_by_hand(batches_of(x, y)), "cached")
    bank, right = x / x.norm(dim=1, keepdim=True), 0
    for query, label in zip(*centre_crops(folder / "val", weights), strict=True):
        votes = (bank @ (query / query.norm()) / 0.1).exp()
        right += int(
            torch.zeros(CLASSES, dtype=votes.dtype).index_add(0, y, votes).argmax() == label
        )
    row = json.loads((tmp_path / "run" / "linear.jsonl").read_text())
    assert row["knn"] == pytest.approx(100 * right / 17)


def test_a_training_file_that_breaks_stops_with_a_checkpoint(
    damaged: tuple[Path, int], weights: Path, tmp_path: Path
) -> None:
    root, _ = damaged
    with pytest.raises(StopRequested) as stopped:
        evaluate(root, weights, tmp_path / "run")
    assert stopped.value.exit_status == 1
    assert state(tmp_path / "run", "linear_last.pt")["epoch"] == 0
    evaluate(root, weights, tmp_path / "run", skip_broken=True)
    evaluate(root, weights, tmp_path / "new", skip_broken=True)
    ours, theirs = trained(tmp_path / "run"), trained(tmp_path / "new")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_result_that_cannot_be_written_is_told(
    folder: Path, weights: Path, whole: Path, tmp_path: Path
) -> None:
    torch.save(state(whole, "linear_last.pt"), tmp_path / "linear_last.pt")
    (tmp_path / "linear.jsonl").symlink_to("/dev/full")
    done = run(command(folder, weights, tmp_path), status=1)
    top_1, _ = results(whole)[0]
    assert f"linear accuracy  top-1 {top_1:.2f} %" in done.stdout
    assert "linear.jsonl cannot be written" in done.stderr
    assert "note the result above" in done.stderr


# ---------------------------------------------------------------- a sweep

# The third diverges: an update of 10^25 times its norm, whose square is no float32.
SWEEP = (2.0, 40.0, 1e30, 400.0)


def features_by_seed(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[count, 512]` that tell their class in part, and labels."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    x = torch.randn(count, 512, generator=generator)
    x[torch.arange(count), labels] += 5
    return x, labels


def fitted(folder: Path, **settings: object) -> torch.nn.Module:
    config = Config("", epochs=EPOCHS, batch_size=BATCH, cache_features=True, **settings)
    batches = cached_batches(*features_by_seed(21), config, ALONE)
    folder.mkdir(exist_ok=True)
    start = new_classifier(512, CLASSES, 0)
    checkpoints = Checkpoints(folder, "last.pt", "previous.pt")
    identity = {"backbone": 0}
    return fit(start, batches, config, identity, checkpoints, ALONE, StopFlag(ALONE))


def test_a_sweep_is_a_run_at_each_rate(tmp_path: Path) -> None:
    together = fitted(tmp_path / "sweep", sweep=SWEEP)
    assert together.diverged().tolist() == [False, False, True, False]
    for k, base_lr in enumerate(SWEEP):
        if k == 2:
            with pytest.raises(UserError, match=r"linear loss became nan in step .*--base-lr"):
                fitted(tmp_path / str(k), base_lr=base_lr)
            continue
        alone = fitted(tmp_path / str(k), base_lr=base_lr)
        weight, bias = larc_by_hand(batches_of(*features_by_seed(21)), base_lr)
        for ours, theirs, exact in (
            (together.weight[k], alone.weight, weight),
            (together.bias[k], alone.bias, bias),
        ):
            # To float32's rounding, of the largest number: six steps, each a sum or two.
            bound = 1e-6 * exact.abs().max().item()
            assert torch.allclose(ours, theirs, rtol=0, atol=bound)
            assert torch.allclose(ours.double(), exact, rtol=0, atol=bound)


def test_a_sweep_whose_every_rate_diverges_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"linear loss became nan in step \d .*lower rates in --sweep"
    ):
        fitted(tmp_path, sweep=(1e30, 1e31))


def test_top_1_and_top_5_of_each_classifier() -> None:
    # Scores are the features themselves: those of class c have rank c, from the highest.
    x = torch.arange(7.0, 0, -1).expand(300, 7)  # more than are scored at a time
    y = torch.arange(300) % 7
    second = torch.eye(7).roll(1, 0)  # the second classifier mistakes each class for the next
    classifiers = Classifiers(torch.nn.Linear(7, 7, bias=True), 2)
    with torch.no_grad():
        classifiers.weight.copy_(torch.stack([torch.eye(7), second]))
        classifiers.bias.zero_()
    # 300 = 42 · 7 + 6: classes 0 to 5 occur 43 times, class 6 42 times.
    assert count_right(classifiers, x, y).tolist() == [[43, 5 * 43], [43, 5 * 43]]
    # Rolled, class 1 scores highest, then 2, 3, 4 and 5.
    only_0 = y == 0
    assert count_right(classifiers, x[only_0], y[only_0]).tolist() == [[43, 43], [0, 0]]
    assert count_right(classifiers, x[:0], y[:0]).tolist() == [[0, 0], [0, 0]]
    assert count_right(torch.nn.Identity(), x, y).tolist() == [[43, 5 * 43]]


def sweep(folder: Path, weights: Path, run_dir: Path, epochs: int = EPOCHS) -> list[str]:
    rates = [str(base_lr) for base_lr in SWEEP]
    return command(folder, weights, run_dir, "--epochs", str(epochs), "--sweep", *rates)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_sweep_leaves(ranks: int, folder: Path, weights: Path, tmp_path: Path) -> None:
    arguments = sweep(folder, weights, tmp_path)
    done = run(on_two_ranks(arguments) if ranks == 2 else arguments)
    trained_by_hand = batches_of(*centre_crops(folder / "train", weights), ranks)
    x, truth = centre_crops(folder / "val", weights)
    classifiers = state(tmp_path, "sweep_last.pt")["classifier"]
    (row,) = [json.loads(line) for line in (tmp_path / "linear.jsonl").read_text().splitlines()]
    assert "top_1" not in row
    assert row["config"]["cache_features"]
    lines = done.stdout.splitlines()
    lines = lines[lines.index("--base-lr   top-1 %   top-5 %") + 1 :]
    for k, (base_lr, entry, line) in enumerate(zip(SWEEP, row["sweep"], lines, strict=False)):
        if k == 2:
            assert entry == {"base_lr": 1e30, "diverged": True}
            assert line.split() == ["1e+30", "diverged"]
            continue
        weight, bias = larc_by_hand(trained_by_hand, base_lr)
        assert torch.allclose(classifiers["weight"][k].double(), weight, rtol=1e-4, atol=1e-6)
        assert torch.allclose(classifiers["bias"][k].double(), bias, rtol=1e-4, atol=1e-6)
        scores = x @ weight.T + bias
        places = (scores > scores.gather(1, truth[:, None])).sum(1)
        expected = [100 * int((places < top).sum()) / 17 for top in (1, 5)]
        assert entry["base_lr"] == base_lr
        assert [entry["top_1"], entry["top_5"]] == pytest.approx(expected)
        assert line.split() == [f"{base_lr:g}", *(f"{percent:.2f}" for percent in expected)]
    best = max((0, 1, 3), key=lambda k: row["sweep"][k]["top_1"])
    assert lines[4].startswith(f"The best, {SWEEP[best]:g}, is chosen on the validation set itself")
    assert not (tmp_path / "linear_last.pt").exists()


def test_a_sweep_killed_and_continued_is_the_same(
    folder: Path, weights: Path, tmp_path: Path
) -> None:
    def arguments(run_dir: Path) -> list[str]:
        return on_two_ranks([*sweep(folder, weights, run_dir, epochs=60), "--workers", "0"])

    whole, continued = tmp_path / "whole", tmp_path / "continued"
    run(arguments(whole))
    kill(start_until(arguments(continued), continued / "sweep_last.pt"))
    assert state(continued, "sweep_last.pt")["epoch"] < 60, "killed too late"
    run(arguments(continued))
    assert_equal(state(continued, "sweep_last.pt"), state(whole, "sweep_last.pt"), "sweep_last.pt")
    accuracies = [json.loads((end / "linear.jsonl").read_text()) for end in (whole, continued)]
    assert accuracies[0]["sweep"] == accuracies[1]["sweep"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sweep": (0.1, -1.0)}, "--sweep must be between 0 and 1e+30; it is -1.0"),
        ({"sweep": (0.1, 0.2, 0.1)}, "--sweep has the same rate twice"),
        ({"sweep": (0.1, math.inf)}, "--sweep must be between 0 and 1e+30; it is inf"),
        ({"base_lr": -1.0}, "--base-lr must be between 0 and 1,000; it is -1.0"),
        ({"batch_size": -1}, "--batch-size must be between 1 and 1,048,576; it is -1"),
        ({"batch_size": 0}, "--batch-size must be between 1 and 1,048,576; it is 0"),
        ({"sweep": (0.1,), "epochs": 0, "knn": True}, "--sweep needs --epochs of 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(
    settings: dict[str, object], sentence: str, folder: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        evaluate(folder, weights, tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []
