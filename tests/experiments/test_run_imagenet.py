"""The ImageNet experiments as a user types them, small: real JPEGs, workers, kills, ranks."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from byol_harder_aug_imagenet.model import online_network
from common.data.shapes import shapes
from common.evaluation import test_runner
from common.runtime.errors import UserError
from common.runtime.seeding import epoch_order
from published_files import put_stl10
from scripts import (
    assert_equal,
    assert_target_follows,
    command_line,
    kill,
    metrics,
    on_two_ranks,
    run,
    run_here,
    start_until,
    state,
)

EXPERIMENTS = {
    "simsiam_imagenet": {"projector-dim": 16, "predictor-dim": 8},
    "byol_harder_aug_imagenet": {"projector-dim": 8, "hidden-dim": 16},
    "simclr_imagenet": {"projector-dim": 8, "hidden-dim": 16, "warmup-epochs": 0},
    "mocov2_imagenet": {"projector-dim": 8, "norm-batch": 4, "queue-length": 20},
    "barlowtwins_imagenet": {"projector-dim": 16, "warmup-epochs": 0},
}
KILLED = ("byol_harder_aug_imagenet", "mocov2_imagenet")  # the others are only stopped
# Of each group of parameters: momentum, weight decay, and for LARC whether it adapts.
OPTIMISERS = {
    "simsiam_imagenet": [(0.9, 1e-4, None)],
    "byol_harder_aug_imagenet": [(0.9, 1e-4, None)],
    "simclr_imagenet": [(0.9, 1e-6, True)],
    "mocov2_imagenet": [(0.9, 1e-4, None)],
    "barlowtwins_imagenet": [(0.9, 1e-6, True), (0.9, 0, False)],
}
PEAK_LRS = {
    "simsiam_imagenet": 0.1,
    "byol_harder_aug_imagenet": 0.1,
    "simclr_imagenet": 0.3 * 8 / 256,
    "mocov2_imagenet": 0.03,
    "barlowtwins_imagenet": 0.3 * 8 / 256,
}
SMALL = {
    "backbone": "resnet18",
    "image-size": 32,
    "epochs": 2,
    "batch-size": 8,  # 2 steps an epoch
    "workers": 1,
    "checkpoint-minutes": 0,  # a checkpoint each step
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventeen JPEGs without classes."""
    root = tmp_path_factory.mktemp("photographs")
    images, _ = shapes(17, 60, seed=0)
    for index, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((0, 0, 60, 48))
        picture.save(root / f"{index:02d}.jpg")
    return root


def command(experiment: str, folder: Path, run_dir: Path, *extra: str) -> list[str]:
    settings = {**SMALL, **EXPERIMENTS[experiment], "data-root": folder, "run-dir": run_dir}
    return command_line(f"{experiment}/run.py", settings, *extra)


def train(experiment: str, run_dir: Path, **settings: object) -> None:
    """In this process, and without workers, which change nothing and take seconds to start."""
    run_here(experiment, {**SMALL, **EXPERIMENTS[experiment], "workers": 0, **settings}, run_dir)


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs)
    for part in state(theirs).keys() - {"config", "metrics"}:
        assert_equal(state(ours)[part], state(theirs)[part], part)


def assert_killed_within(run_dir: Path) -> None:
    progress = state(run_dir)["progress"]
    assert (progress["epoch"], progress["step"]) > (1, 0), "killed too early"
    assert not (run_dir / "backbone.pt").exists(), "killed too late"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_killed_or_stopped_and_continued_is_the_same_run(
    experiment: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    train(experiment, whole, data_root=str(folder))
    assert "weights" in capsys.readouterr().out
    rows = metrics(whole)
    assert [row["epoch"] for row in rows] == [1, 2]
    peak = PEAK_LRS[experiment]
    assert [row["lr"] for row in rows] == pytest.approx([peak, peak / 2])
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["symmetric"] + row["asymmetric"], rel=1e-6, abs=1e-6
        )
        assert "reverse" not in row
    assert (whole / "views.png").exists()
    groups = state(whole)["optimiser"]["param_groups"]
    used = [(group["momentum"], group["weight_decay"], group.get("adapts")) for group in groups]
    assert used == OPTIMISERS[experiment]

    if experiment in KILLED:
        # The first checkpoint is from before the first step: until there is a second one.
        kill(start_until(command(experiment, folder, run_dir), run_dir / "previous.pt"))
        assert_killed_within(run_dir)
    else:
        train(experiment, run_dir, data_root=str(folder), max_steps=1)
    train(experiment, run_dir, data_root=str(folder))
    assert_same_end(run_dir, whole)
    last = state(run_dir)["model"]
    for name, value in state(run_dir, "backbone.pt").items():
        assert torch.equal(value, last[f"backbone.{name}"]), name


def test_two_ranks_killed_and_continued_end_with_the_same_weights(
    folder: Path, tmp_path: Path
) -> None:
    """MoCo has every part that a run can have: a second network, and a queue of all ranks' keys."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    alone = ("--workers", "0")
    run(on_two_ranks(command("mocov2_imagenet", folder, whole, *alone)))
    arguments = on_two_ranks(command("mocov2_imagenet", folder, run_dir, *alone))
    kill(start_until(arguments, run_dir / "previous.pt"))
    assert_killed_within(run_dir)
    run(arguments)
    assert_same_end(run_dir, whole)


def test_two_ranks_stop_together_with_one_checkpoint(folder: Path, tmp_path: Path) -> None:
    arguments = command("simsiam_imagenet", folder, tmp_path, "--epochs", "100")
    process = start_until(on_two_ranks(arguments), tmp_path / "last.pt")
    process.send_signal(signal.SIGTERM)  # to torchrun alone, which passes it on
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("Stopped, with a checkpoint") == 1
    progress = state(tmp_path)["progress"]
    assert progress["epoch"] < 100
    assert not (tmp_path / "backbone.pt").exists()


def test_a_photograph_that_breaks_stops_with_a_checkpoint_and_both_remedies_work(
    folder: Path, tmp_path: Path
) -> None:
    """On two ranks, of which one meets the file."""
    photographs, run_dir, whole = tmp_path / "photographs", tmp_path / "run", tmp_path / "whole"
    shutil.copytree(folder, photographs)

    def arguments(run_dir: Path, *extra: str) -> list[str]:
        return on_two_ranks(command("simsiam_imagenet", photographs, run_dir, *extra))

    # The file is used in the first epoch's second step, by the last rank.
    index = int(epoch_order(17, 0, 1)[15])
    broken = photographs / f"{index:02d}.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[:200])
    done = run(arguments(run_dir), status=1)
    (line,) = [line for line in done.stderr.splitlines() if str(broken) in line]
    assert re.search(r"error: .* cannot be decoded .*Restore .* continue with --skip-broken$", line)
    assert done.stderr.count("Stopped, with a checkpoint") == 1
    assert "Error" not in done.stderr.replace("ChildFailedError", "")
    assert state(run_dir)["progress"]["step"] == 2
    stopped = tmp_path / "stopped"
    shutil.copytree(run_dir, stopped)

    done = run(arguments(run_dir, "--skip-broken"))
    told = rf"process \d: broken files that were replaced by the next ones: 1 \({broken} cannot"
    is_met_again = index in epoch_order(17, 0, 2)[:16]
    assert len(re.findall(told, done.stdout)) == int(is_met_again)
    run(arguments(whole, "--skip-broken", "--workers", "0"))
    assert_same_end(run_dir, whole)

    broken.write_bytes(content)
    run(arguments(stopped, "--workers", "0"))
    assert [row["epoch"] for row in metrics(stopped)] == [1, 2]


def test_a_run_on_a_folder_continues_on_its_archive_and_another_list_of_the_same_classes(
    tmp_path: Path,
) -> None:
    """The whole run is on the folder, and the other one's second half on the archive."""
    photographs, zipped = tmp_path / "set", tmp_path / "set.zip"
    images, _ = shapes(28, 40, seed=0)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, image in reversed([*enumerate(images)]):
            name = f"{'val' if index > 21 else 'train'}/{'abc'[index % 3]}/{index:02d}.jpg"
            path = photographs / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            archive.write(path, f"set/{name}")
    first, second, other = (tmp_path / name for name in ("first.txt", "second.txt", "other.txt"))
    first.write_text("a\nb\n")
    second.write_text("b\na  # the same\n")
    other.write_text("a\nc\n")

    def train_on(run_dir: str, data_root: Path, classes: Path, **extra: object) -> Path:
        paths = {"data_root": str(data_root), "classes": str(classes)}
        settings = {"batch-size": 5, "knn_every": 1, **paths, **extra}
        train("simsiam_imagenet", tmp_path / run_dir, **settings)
        return tmp_path / run_dir

    whole = train_on("whole", photographs, first)
    train_on("run", photographs, first, max_steps=3)
    with pytest.raises(UserError, match="15 images"):
        train_on("run", zipped, other)
    assert_same_end(train_on("run", zipped, second), whole)
    assert state(whole)["progress"]["images"] == 15
    assert "knn" in metrics(whole)[-1]


ERRORS = {
    "epochs": ({"epochs": 0}, "--epochs must be "),
    "prefetch": ({"prefetch": 0}, "--prefetch must be between 1 and"),
    "weight decay": (
        {"weight_decay": math.nan},
        "--weight-decay must be between 0 and 1; it is nan",
    ),
    "enlarged": ({"dataset": "stl10"}, "STL-10 has 96-px images, smaller than views of 224 px"),
    "classes": ({"dataset": "shapes", "classes": "x"}, "--classes has an effect with --dataset f"),
    "batch": ({"dataset": "shapes", "batch_size": 6016}, "does not fit a set of 6000 images"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_a_user_can_mend_stops_before_any_work(case: str, tmp_path: Path) -> None:
    wrong, message = ERRORS[case]
    script = importlib.import_module("simsiam_imagenet.run")
    config = script.Config(**{"device": "cpu", "run_dir": str(tmp_path / "run"), **wrong})
    with pytest.raises(UserError, match=re.escape(message)):
        script.main(config)
    assert not list(tmp_path.glob("run/*.pt"))


@pytest.mark.parametrize("regime", ["baseline", "joint"])
def test_byols_other_regimes(regime: str, folder: Path, tmp_path: Path) -> None:
    plain = {"standard_randaug": (0, 0), "heavy_crop": False, "max_steps": 1}
    settings = {"data_root": str(folder), "regime": regime, **plain}
    train("byol_harder_aug_imagenet", tmp_path, **settings)
    (row,) = metrics(tmp_path)
    assert row["loss"] == pytest.approx(row["symmetric"], abs=1e-6)
    assert "asymmetric" not in row
    torch.manual_seed(0)
    start = online_network("resnet18", hidden_dim=16, projector_dim=8)
    assert_target_follows(start, tmp_path, online_passes=2)


def test_stl10_pretrains_on_all_and_is_evaluated_on_the_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last epoch's kNN is test_runner.py's: both have the labelled images as their bank."""
    put_stl10(tmp_path, monkeypatch, train=20, unlabelled=13, test=9)
    names = ("backbone", "image-size", "workers", "device")
    small = {name.replace("-", "_"): SMALL[name] for name in names}
    small |= {"dataset": "stl10", "data_root": str(tmp_path), "precision": "fp32"}
    script = importlib.import_module("simsiam_imagenet.run")
    heads = {"projector_dim": 16, "predictor_dim": 8, "batch_size": 16, "epochs": 1}
    run_dir = tmp_path / "run"
    script.main(script.Config(**small, **heads, knn_every=1, run_dir=str(run_dir)))
    assert "Found 33 images, 20 of them of 10 classes in" in capsys.readouterr().out
    with Image.open(run_dir / "neighbours.png") as picture:
        assert picture.height == 10 * (3 * 32 + 8)

    pretrained = {"pretrained": str(run_dir / "last.pt"), "knn": True, "epochs": 1}
    test_runner.main(test_runner.Config(**small, **pretrained, batch_size=20))
    result = json.loads((run_dir / "linear.jsonl").read_text())
    assert result["images"] == 9
    (row,) = metrics(run_dir)
    assert result["knn"] == pytest.approx(row["knn"])
    assert "Found 20 images of 10 classes in" in capsys.readouterr().out
    assert state(run_dir, "linear_last.pt")["classifier"]["weight"].shape == (10, 512)
