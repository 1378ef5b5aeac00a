"""simsiam_cifar10/run.py as a user types it: real processes, real kills, real files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.augment.cifar10 import centre_view, normalised
from common.data.in_memory import load_images
from common.data.shapes import CLASS_NAMES
from common.evaluation.classifier import checksum
from common.evaluation.in_memory import Evaluation
from common.networks.resnet import CifarResNet
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from common.training import training
from scripts import ROOT, assert_equal, command_line, metrics, on_two_ranks, run, run_here, state

RUN = ROOT / "simsiam_cifar10" / "run.py"
SMALL = {
    "dataset": "folder",
    "width": 8,
    "projector-dim": 16,
    "predictor-dim": 8,
    "epochs": 3,
    "warmup-epochs": 1,
    "batch-size": 40,  # 5 steps an epoch
    "base-lr": 0.3,
    "linear-epochs": 3,
    "checkpoint-minutes": 0,  # a checkpoint each step
    "device": "cpu",
}


def command(folder: Path, run_dir: Path, *extra: str) -> list[str]:
    settings = {**SMALL, "data-root": folder, "run-dir": run_dir}
    return command_line("simsiam_cifar10/run.py", settings, *extra)


def train(folder: Path, place: Path, **settings: object) -> None:
    run_here("simsiam_cifar10", {**SMALL, "data-root": str(folder), **settings}, place)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs)
    for name in ("last.pt", "best.pt", "linear_last.pt"):
        assert_equal(state(ours, name), state(theirs, name), name)
    assert_equal(state(ours, "backbone.pt"), state(theirs, "backbone.pt"), "backbone.pt")


@pytest.fixture(scope="session")
def whole_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(folder, run_dir))
    assert "untrained" in done.stdout
    assert f"-m tensorboard.main --logdir {run_dir}" in done.stdout
    return run_dir


def test_a_run_leaves_what_it_promises(whole_run: Path, folder: Path) -> None:
    rows = metrics(whole_run)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 3]
    assert set(rows[0]) == {"epoch", "knn"}
    trained = {"epoch", "loss", "symmetric", "asymmetric", "reverse", "spread", "lr", "knn"}
    assert all(set(row) == trained for row in rows[1:4])
    assert set(rows[4]) == {"epoch", "linear"}
    peak = 0.3 * 40 / 256
    # warm-up 1 is over before epoch 1: half a cosine over epochs 1, 2, 3
    assert [row["lr"] for row in rows[1:4]] == pytest.approx([peak, peak / 2, 0])
    for row in rows[1:4]:
        parts = row["symmetric"] + 0.9 * row["asymmetric"] + 0.1 * row["reverse"]
        assert row["loss"] == pytest.approx(parts, abs=1e-6)

    settings = json.loads((whole_run / "config.json").read_text())
    assert settings["config"]["regime"] == "dssl"
    assert settings["starts"][0]["versions"]["torch"] == torch.__version__
    assert settings["starts"][0]["precision"] == "fp32"
    width, height = Image.open(whole_run / "views.png").size
    assert width > 10 * 96
    assert height > 5 * 96

    backbone = CifarResNet("resnet18", width=8)
    backbone.load_state_dict(state(whole_run, "backbone.pt"))
    last = state(whole_run)["model"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, last[f"backbone.{name}"]), name
    (group,) = state(whole_run)["optimiser"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    probe = state(whole_run, "linear_last.pt")["identity"]
    assert probe["backbone"] == checksum(backbone.state_dict())
    data = load_images("folder", str(folder), 32, 0, False, 1, Ranks(0, 1, torch.device("cpu")))
    with torch.no_grad():
        features = (backbone.eval()(normalised(centre_view(part.images))) for part in data)
        bank, queries = (rows.double() for rows in features)
    cosine = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    votes = (cosine / 0.1).exp() @ F.one_hot(data.train.labels, 10).double()  # all 200 vote
    linear = state(whole_run, "linear_last.pt")["classifier"]
    scores = queries @ linear["weight"].double().T + linear["bias"].double()
    for accuracy, found in ((rows[3]["knn"], votes), (rows[4]["linear"], scores)):
        right = (found.argmax(1) == data.test.labels).double().mean()
        assert accuracy == pytest.approx(100 * right.item())
    best = max(rows[1:4], key=lambda row: row["knn"])
    assert state(whole_run, "best.pt")["epoch"] == best["epoch"]
    assert not list(whole_run.glob("*.partial"))


def test_bf16_is_near_fp32_and_continues_exactly(folder: Path, tmp_path: Path) -> None:
    # Of one step an epoch the first epoch's row tells the loss of the same start, order and views.
    one_step = {"batch_size": 200, "linear_epochs": 0}
    for precision in ("fp32", "bf16"):
        train(folder, tmp_path / precision, **one_step, precision=precision)
    losses = [metrics(tmp_path / precision)[1]["loss"] for precision in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    weights = state(tmp_path / "bf16")["model"].values()
    assert {weight.dtype for weight in weights} == {torch.float32, torch.int64}

    run_dir = tmp_path / "continued"
    for extra in ({"max_steps": 2}, {}):
        train(folder, run_dir, **one_step, precision="bf16", **extra)
    assert metrics(run_dir) == metrics(tmp_path / "bf16")
    assert_equal(state(run_dir), state(tmp_path / "bf16"), "last.pt")


def test_typing_a_finished_run_again_changes_nothing(whole_run: Path, folder: Path) -> None:
    before = metrics(whole_run)
    weights = state(whole_run)["model"]
    done = run(command(folder, whole_run))
    assert "kNN accuracy" in done.stdout
    assert metrics(whole_run) == before
    assert_equal(state(whole_run)["model"], weights, "last.pt")


def test_killed_at_many_moments_and_continued_is_the_same_run(
    whole_run: Path, folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Seconds after a checkpoint appears: within a step, an evaluation, a write, the linear probe.
    for moment, wait in enumerate((0.0, 0.03, 0.11, 0.3, 0.06)):
        process = subprocess.Popen(
            command(folder, run_dir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seen = (run_dir / "last.pt").stat().st_mtime_ns if moment else 0
        while process.poll() is None:
            path = run_dir / "last.pt"
            if path.exists() and path.stat().st_mtime_ns > seen:
                break
            time.sleep(0.002)
        time.sleep(wait)
        process.kill()
        process.wait()
    run(command(folder, run_dir))
    assert_same_run(run_dir, whole_run)

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("epoch/knn")] == [0, 1, 2, 3]
    logged = [event.value for event in events.Scalars("epoch/loss")]
    assert logged == pytest.approx([row["loss"] for row in metrics(run_dir)[1:4]], rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    whole_run: Path, folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*command(folder, run_dir), "--checkpoint-minutes", "60"]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (run_dir / "last.pt").exists():
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert "the same command continues" in output
    progress = state(run_dir)["progress"]
    assert (progress["epoch"], progress["step"]) > (1, 0), "the checkpoint from before the steps"
    train(folder, run_dir, checkpoint_minutes=60)
    assert_same_run_but_for_minutes(run_dir, whole_run)


def assert_same_run_but_for_minutes(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs)
    assert_equal(state(ours)["model"], state(theirs)["model"], "last.pt")
    assert_equal(state(ours)["optimiser"], state(theirs)["optimiser"], "last.pt")


def test_max_steps_ends_within_an_epoch_and_more_go_on_from_there(
    whole_run: Path, folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train(folder, run_dir, max_steps=7, linear_epochs=0)
    assert state(run_dir)["progress"]["epoch"] == 2
    assert state(run_dir)["progress"]["step"] == 2
    assert [row["epoch"] for row in metrics(run_dir)] == [0, 1, 2]
    train(folder, run_dir)
    assert metrics(run_dir) == metrics(whole_run)
    assert_equal(state(run_dir)["model"], state(whole_run)["model"], "last.pt")


def test_a_run_that_an_older_version_began(
    whole_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It did not know --reverse-weight, and had a setting that is gone."""
    run_dir = tmp_path / "run"
    quick = {"linear_epochs": 0, "knn_every": 0, "checkpoint_minutes": 9}
    train(folder, run_dir, **quick, max_steps=7)
    saved = state(run_dir)
    del saved["config"]["reverse_weight"]
    torch.save({**saved, "config": {**saved["config"], "tokens": 3}}, run_dir / "last.pt")
    settings = json.loads((run_dir / "config.json").read_text())
    del settings["config"]["reverse_weight"]
    (run_dir / "config.json").write_text(json.dumps(settings))

    with pytest.raises(UserError) as gone:
        train(folder, run_dir, **quick)
    assert "other settings: it has the settings tokens. Continue it with the ver" in str(gone.value)
    torch.save(saved, run_dir / "last.pt")
    with pytest.raises(UserError) as unlike:
        train(folder, run_dir, **quick, reverse_weight=0.3)
    assert (
        "other settings: reverse_weight was 0.1, now 0.3; the run began before reverse_weight "
        "existed: leave that at its default. Repeat"
    ) in str(unlike.value)
    capsys.readouterr()
    train(folder, run_dir, **quick)
    assert "The run is older than these settings: reverse_weight\n" in capsys.readouterr().out
    for name in ("model", "optimiser"):
        assert_equal(state(run_dir)[name], state(whole_run)[name], name)
    assert state(run_dir)["config"]["reverse_weight"] == 0.1


@pytest.mark.parametrize("regime", ["baseline", "joint"])
def test_the_other_regimes_run_without_labels(folder: Path, tmp_path: Path, regime: str) -> None:
    flat = folder / "train" / CLASS_NAMES[0]
    run_dir = tmp_path / "run"
    done = run(command(flat, run_dir, "--regime", regime, "--batch-size", "10", "--max-steps", "3"))
    assert done.stdout.count("No labelled evaluation") == 1
    rows = metrics(run_dir)
    assert len(rows) == 2
    assert all("knn" not in row and "linear" not in row for row in rows)
    assert (run_dir / "backbone.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_neither_a_full_disk_for_its_output_nor_a_renamed_folder_changes_a_run(
    whole_run: Path, folder: Path, tmp_path: Path
) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen(
            command(folder, run_dir),
            stdout=full,
            stderr=full,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None and not (run_dir / "last.pt").exists():
            time.sleep(0.002)
        run_dir.rename(elsewhere)
        assert process.wait(timeout=300) == 0
    assert metrics(run_dir) == metrics(whole_run)
    for name in ("last.pt", "backbone.pt"):
        assert_equal(state(run_dir, name), state(whole_run, name), name)
    assert (elsewhere / "last.pt").exists()


def test_two_processes_continue_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    def launch(run_dir: Path, *extra: str) -> None:
        run(on_two_ranks(command(folder, run_dir, "--epochs", "2", "--linear-epochs", "1", *extra)))

    launch(tmp_path / "whole")
    launch(tmp_path / "halves", "--max-steps", "3", "--knn-every", "0")
    launch(tmp_path / "halves")
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert_equal(state(tmp_path / "halves")["model"], state(tmp_path / "whole")["model"], "last.pt")
    assert [row["epoch"] for row in metrics(tmp_path / "whole")] == [0, 1, 2, 2]


def test_an_error_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    done = run(command(folder, tmp_path / "run", "--randaug-magnitude", "31"), status=1)
    assert done.stderr == "error: --randaug-magnitude must be between 0 and 30; it is 31\n"
    assert not (tmp_path / "run").exists()


ERRORS = {
    "missing data": ({"data_root": "/nowhere"}, "/nowhere: no such folder"),
    "number of operations": (
        {"randaug_num_ops": 0},
        "--randaug-num-ops must be between 1 and 100; it is 0",
    ),
    "batch": ({"batch_size": 512}, "512 does not fit a set of 200 images"),
    "warm-up": ({"warmup_epochs": 3}, "must be less than --epochs 3"),
    "epochs": ({"epochs": 1, "warmup_epochs": 0}, "--epochs must be at least 2"),
    "rate": ({"base_lr": -0.1}, "--base-lr must be between 0 and 1,000; it is -0.1"),
    "no effect": ({"regime": "joint", "reverse_weight": 0.2}, "in the dssl regime only"),
    "run directory": ({"run_dir": "/proc/run"}, "choose another with --run-dir"),
    "device": ({"device": "gpu"}, "not a device"),
    "width": ({"width": 12}, "--width must be between 8 and 4,096 and a multiple of 8; it is 12"),
}


def test_a_run_folder_among_the_training_images_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its pictures would be trained on."""
    root = tmp_path / "images"
    (root / "train").mkdir(parents=True)
    for place in (root / "train" / "run", root / "train"):
        with pytest.raises(UserError, match="choose a --run-dir outside it"):
            train(root, place)
    assert not list(root.glob("train/*"))
    with pytest.raises(UserError, match=r"--data-root .* cannot be read"):  # in one sentence too
        train(folder, tmp_path / "run", **{"data-root": "x" * 300})


def test_an_error_in_the_evaluation_does_not_lose_the_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 5, "linear_epochs": 0, "checkpoint_minutes": 9}

    def fail(evaluation: Evaluation, epoch: int, every: int) -> dict[str, float]:
        raise UserError("a broken file")

    for seconds, steps in ((-1, 5), (1000, 0)):  # one epoch has five steps
        monkeypatch.setattr(training, "EVALUATED_UNSAVED", seconds)
        run_dir = tmp_path / str(steps)
        with monkeypatch.context() as patch:
            patch.setattr(Evaluation, "after_epoch", fail)
            with pytest.raises(UserError, match="a broken file"):
                train(folder, run_dir, **settings)
        assert state(run_dir)["progress"]["step"] == steps
        train(folder, run_dir, **settings)
        # Where no step was left there is no speed.
        assert ("images_per_second" in (run_dir / "metrics.jsonl").read_text()) == (steps == 0)
    assert_same_run_but_for_minutes(tmp_path / "5", tmp_path / "0")


@pytest.mark.parametrize("case", ERRORS)
def test_what_a_user_can_mend_stops_before_any_work(
    folder: Path, tmp_path: Path, case: str
) -> None:
    wrong, message = ERRORS[case]
    with pytest.raises(UserError, match=re.escape(message)):
        train(folder, tmp_path / "run", **wrong)
    assert not list(tmp_path.glob("run/*.pt"))


def test_another_experiment_is_refused_and_fresh_keeps_the_old_one(
    folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    short = {"max_steps": 2, "linear_epochs": 0}
    train(folder, run_dir, **short)
    weights = (run_dir / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"base_lr was 0.3, now 0.1; seed was 0, now 3"):
        train(folder, run_dir, **short, base_lr=0.1, seed=3)
    other = tmp_path / "images"  # of the same names
    shutil.copytree(folder, other)
    for path in other.rglob("*.png"):
        ImageOps.mirror(Image.open(path)).save(path)
    with pytest.raises(UserError, match=r"started with other training images \(200 images, "):
        train(other, run_dir, **short)
    assert (run_dir / "last.pt").read_bytes() == weights
    train(folder, run_dir, **short, base_lr=0.1, fresh=True)
    assert (tmp_path / "run.1" / "last.pt").read_bytes() == weights
    assert state(run_dir)["config"]["base_lr"] == 0.1


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    done = run(
        command(folder, tmp_path / "run", "--base-lr", "1000", "--weight-decay", "1"), status=1
    )
    assert "no longer finite" in done.stderr or "became" in done.stderr
    assert "Traceback" not in done.stderr
    for value in state(tmp_path / "run")["model"].values():
        assert value.isfinite().all()


def test_runs_from_the_folder_too(folder: Path, tmp_path: Path) -> None:
    arguments = command(folder, tmp_path / "run", "--max-steps", "1", "--linear-epochs", "0")
    arguments[1] = "run.py"
    run(arguments, cwd=RUN.parent)
    assert (tmp_path / "run" / "backbone.pt").exists()
