"""What a run's folder holds after all that can happen."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.runtime import precision, repository
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from common.training import board
from common.training.checkpoint import read_checkpoint
from common.training.config_json import MAY_CHANGE, write_config
from common.training.progress import Progress
from common.training.run_folder import RunLog
from processes import files, forking, in_child, limit_files_to
from simsiam_cifar10.run import Config

torch.set_num_threads(1)

ALONE = Ranks(0, 1, torch.device("cpu"))
NOT_MAIN = Ranks(1, 1, torch.device("cpu"))  # world size 1, so that it waits for nobody
SETTINGS: dict[str, Any] = {
    **asdict(Config()),
    "workers": 4,
    "prefetch": 4,
    "pin_memory": True,
    "knn_images": 50,
    "classes": "",
}  # as the ImageNet experiments have


@pytest.fixture(autouse=True)
def no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this repository's git alone; `checkout` makes one of its own."""
    monkeypatch.setattr(repository, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a run"


def open_log(
    folder: Path, config: Mapping[str, Any] | None = None, fresh: bool = False, ranks: Ranks = ALONE
) -> RunLog:
    return RunLog(folder, SETTINGS if config is None else config, SETTINGS, fresh, ranks)


def at(epoch: int) -> dict[str, Any]:
    """The least that a run saves."""
    return {"progress": {"epoch": epoch}}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: step and value of each scalar."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return {
        name.removeprefix("epoch/"): [(event.step, event.value) for event in events.Scalars(name)]
        for name in names
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder and below it, except the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run_epochs(
    folder: Path, epochs: range, values: float, checkpoint_after: int | None = None
) -> None:
    """A process that continues the run through some epochs and ends without a word."""
    log = open_log(folder)
    saved = log.load_checkpoint()
    log.open(saved["progress"]["epoch"] if saved else 0)
    for epoch in epochs:
        log.write(epoch, {"loss": values + epoch})
        if epoch == checkpoint_after:
            log.save(at(epoch + 1))


def wait_for_the_next_second() -> None:
    """TensorBoard reads its files in the order of their names, which count whole seconds."""
    time.sleep(1.01 - time.time() % 1)


# ---------------------------------------------------------------- metrics and events


def test_what_came_after_the_checkpoint_is_forgotten(folder: Path) -> None:
    run_epochs(folder, range(1, 6), values=0.5, checkpoint_after=3)
    assert [row["epoch"] for row in rows_of(folder)] == [1, 2, 3, 4, 5]
    wait_for_the_next_second()
    run_epochs(folder, range(4, 8), values=0.25, checkpoint_after=7)

    expected = [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.25), (5, 5.25), (6, 6.25), (7, 7.25)]
    rows = [{"epoch": epoch, "loss": loss} for epoch, loss in expected]
    assert rows_of(folder) == rows
    assert events_of(folder) == {"loss": expected}  # every epoch once, and no text


def test_what_came_before_the_first_checkpoint_is_forgotten(folder: Path) -> None:
    run_epochs(folder, range(1), values=0.5)
    wait_for_the_next_second()
    run_epochs(folder, range(2), values=0.25)
    assert [row["loss"] for row in rows_of(folder)] == [0.25, 1.25]
    assert events_of(folder) == {"loss": [(0, 0.25), (1, 1.25)]}


def test_metrics_are_cut_to_the_checkpoints_length_to_the_byte(folder: Path) -> None:
    run_epochs(folder, range(1, 3), values=0.5, checkpoint_after=1)
    text = (folder / "metrics.jsonl").read_bytes()
    first_row = text[: text.index(b"\n") + 1]
    assert read_checkpoint(folder / "last.pt")["metrics"].encode() == first_row
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 3, "lo')  # the process was killed in the middle of a row
    log = open_log(folder)
    log.load_checkpoint()
    log.open(2)
    assert (folder / "metrics.jsonl").read_bytes() == first_row
    log.write(2, {"loss": 1.0})
    assert (folder / "metrics.jsonl").read_bytes() == first_row + b'{"epoch": 2, "loss": 1.0}\n'


def test_a_checkpoint_holds_state_settings_and_the_log_s_length(folder: Path) -> None:
    log = open_log(folder)
    log.open(0)
    log.write(1, {"loss": 0.5})
    log.save({**at(2), "model": {"weight": torch.arange(3)}})
    log.write(2, {"loss": 0.25})
    log.save({**at(3), "model": {"weight": torch.arange(4)}})
    log.save_file("best.pt", {"knn": 12.5})
    one, both = (
        '{"epoch": 1, "loss": 0.5}\n',
        '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.25}\n',
    )
    for name, length, rows in (("last.pt", 4, both), ("previous.pt", 3, one)):
        state = read_checkpoint(folder / name)
        assert state.keys() == {"progress", "model", "config", "metrics"}
        assert torch.equal(state["model"]["weight"], torch.arange(length))
        assert state["config"] == SETTINGS
        assert state["metrics"] == rows
    assert read_checkpoint(folder / "best.pt") == {"knn": 12.5}


def test_another_precision_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor of another kind, which `--precision auto` follows."""
    told = []
    for is_native in (True, False, False):
        monkeypatch.setattr(precision, "has_native_bf16", lambda _, answer=is_native: answer)
        log = open_log(folder, {**SETTINGS, "precision": "auto"})
        log.tell = told.append
        log.load_checkpoint()
        log.open(1)
        log.save(at(1))
        log.close()
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert [start["precision"] for start in starts] == ["bf16", "fp32", "fp32"]
    (line,) = told
    assert "in bf16 until now and continues in fp32" in line


def test_another_number_of_processes_on_cpus_is_told(folder: Path) -> None:
    """BatchNorm there takes each process's own images."""
    folder.mkdir(parents=True)
    told = []
    for processes in (1, 2, 2):
        ranks = Ranks(0, processes, torch.device("cpu"))
        warnings = write_config(folder / "config.json", SETTINGS, ranks, continues=bool(told))
        told.append(warnings)
    (line,) = told[1]
    assert "had 1 processes until now and continues with 2: on CPUs BatchNorm" in line
    assert told[0] == told[2] == []


def test_the_picture(folder: Path) -> None:
    pixels = numpy.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=numpy.uint8)
    log = open_log(folder)
    log.open(0)
    log.picture("views", Image.fromarray(pixels), 0)
    assert (numpy.asarray(Image.open(folder / "views.png")) == pixels).all()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    (shown,) = events.Images("views")
    assert (shown.step, shown.height, shown.width) == (0, 6, 9)


def test_other_ranks_write_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = open_log(folder)
    main.open(0)
    main.write(1, {"loss": 1.5})
    main.save(at(2))
    before = contents(folder)
    log = open_log(folder, ranks=NOT_MAIN)
    assert log.load_checkpoint()["progress"]["epoch"] == 2  # reading is every rank's
    log.open(0)
    log.write(1, {"loss": 0.5})
    log.save(at(1), must=True)
    log.save_file("best.pt", {}, must=True)
    log.picture("views", Image.new("RGB", (2, 2)), 0)
    log.tell("nothing")
    log.tell_epoch(1, 2, {"spread": 0.0})
    log.tell_result(Progress(), None)
    log.close()
    assert contents(folder) == before
    assert files(folder.parent) == ["a run"]
    assert capsys.readouterr().out == ""


def test_a_kill_between_the_last_row_and_its_checkpoint_shows_the_row_once(folder: Path) -> None:
    """The result's row is of the last epoch, whose other row is in the checkpoint already."""

    def finish(log: RunLog) -> None:
        log.write(2, {"linear": 75.0})

    run_epochs(folder, range(1, 3), values=0.5, checkpoint_after=2)
    for _ in range(2):  # the first is killed after it
        wait_for_the_next_second()
        log = open_log(folder)
        log.load_checkpoint()
        log.open(3)
        finish(log)
        log.close()
    assert rows_of(folder) == [
        {"epoch": 1, "loss": 1.5},
        {"epoch": 2, "loss": 2.5},
        {"epoch": 2, "linear": 75.0},
    ]
    assert events_of(folder) == {"loss": [(1, 1.5), (2, 2.5)], "linear": [(2, 75.0)]}


def test_the_untrained_row_and_the_picture_stay_when_epoch_1_is_done_again(folder: Path) -> None:
    log = open_log(folder)
    log.open(0)
    log.picture("views", Image.new("RGB", (3, 2)), 0)
    log.write(0, {"knn": 10.0})
    log.save(at(1))
    log.write(1, {"knn": 20.0})
    log.close()
    wait_for_the_next_second()
    log = open_log(folder)
    log.load_checkpoint()
    log.open(1)
    log.write(1, {"knn": 30.0})
    log.close()
    assert events_of(folder) == {"knn": [(0, 10.0), (1, 30.0)]}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [picture.step for picture in events.Images("views")] == [0]


def test_events_that_were_deleted_come_back_from_the_checkpoint(folder: Path) -> None:
    run_epochs(folder, range(1, 4), values=0.5, checkpoint_after=3)
    shutil.rmtree(folder / "tensorboard")
    run_epochs(folder, range(4, 5), values=0.5)
    assert events_of(folder) == {"loss": [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5)]}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the name")
def test_a_folder_whose_name_is_not_utf_8_goes_without_events(folder: Path) -> None:
    folder = folder.parent / os.fsdecode(b"run \xff")

    def run() -> list[str]:
        for epoch in (1, 2):
            run_epochs(folder, range(epoch, epoch + 1), values=0.5, checkpoint_after=epoch)
        return sys.stdout.getvalue().splitlines()

    (first, second) = in_child(run)
    assert first == second
    assert "TensorBoard cannot write to" in first
    assert rows_of(folder) == [{"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 2.5}]


# ---------------------------------------------------------------- a folder that disappears


@pytest.mark.parametrize("event", ["deleted", "renamed", "deleted with its parent"])
def test_a_folder_that_disappears_is_made_again(
    event: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(folder)
    log.open(0)
    log.write(1, {"loss": 1.5})
    log.save(at(2))
    before = contents(folder)
    capsys.readouterr()
    elsewhere = folder.parent / "elsewhere"
    if event == "renamed":
        folder.rename(elsewhere)
    else:
        shutil.rmtree(folder if event == "deleted" else folder.parent)
    log.save(at(2))
    told = capsys.readouterr().out
    assert told.count(f"warning: {folder} was deleted or renamed during the run") == 1
    log.write(2, {"loss": 2.5})
    log.save(at(3))
    log.close()
    assert capsys.readouterr().out == ""
    assert {"config.json", "metrics.jsonl", "last.pt", "previous.pt"} < contents(folder).keys()
    assert rows_of(folder) == [{"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 2.5}]
    assert events_of(folder) == {"loss": [(1, 1.5), (2, 2.5)]}
    assert open_log(folder).load_checkpoint()["progress"] == {"epoch": 3}
    if event == "renamed":
        assert contents(elsewhere) == before


def test_a_folder_that_was_made_again_is_locked(folder: Path) -> None:
    log = open_log(folder)
    log.open(0)
    shutil.rmtree(folder)
    log.write(1, {"loss": 1.5})

    def try_to_open() -> str:
        with pytest.raises(UserError) as raised:
            open_log(folder)
        return str(raised.value)

    assert "another process is using" in in_child(try_to_open)


def test_only_the_lock_deleted_changes_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(folder)
    log.open(0)
    log.write(1, {"loss": 1.5})
    before = contents(folder)
    (folder / ".lock").unlink()
    log.save(at(2))
    assert before.items() < contents(folder).items()
    assert (folder / ".lock").exists()
    assert capsys.readouterr().out == ""


def test_a_run_does_not_continue_in_another_run_s_folder(folder: Path) -> None:
    log = open_log(folder)
    log.open(0)
    log.save(at(1))
    folder.rename(folder.parent / "elsewhere")
    other = open_log(folder)
    other.open(0)
    other.close()
    before = contents(folder)
    with pytest.raises(UserError, match="rename this run's folder back"):
        log.save(at(2))
    assert contents(folder) == before
    # The remedy.
    folder.rename(folder.parent / "other")
    (folder.parent / "elsewhere").rename(folder)
    log.close()
    assert open_log(folder).load_checkpoint()["progress"] == {"epoch": 1}


def test_a_folder_that_cannot_be_made_again_stops_the_run(folder: Path) -> None:
    log = open_log(folder)
    log.open(0)
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file")
    for use in (lambda: log.save(at(1)), lambda: log.write(1, {"loss": 0.5})):
        with pytest.raises(UserError, match=r"cannot be written .* choose another with --run-dir"):
            use()


# ---------------------------------------------------------------- settings


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


def test_may_change_names_real_settings() -> None:
    names = {field.name for field in fields(Config)}
    assert names | {"workers", "prefetch", "pin_memory", "knn_images", "classes"} >= MAY_CHANGE


def refusal(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The error with which these settings are refused; None where they continue the run."""
    try:
        assert open_log(folder, config).load_checkpoint() is not None
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting(name: str, folder: Path) -> None:
    """Where and how it runs, what is logged and how far it goes may change; nothing else."""
    open_log(folder).save(at(3))
    value = SETTINGS[name]
    message = refusal(folder, {**SETTINGS, name: changed(value)})
    if name in {
        *(
            "device",
            "workers",
            "prefetch",
            "pin_memory",
            "skip_broken",
            "compile",
            "data_root",
            "classes",
            "run_dir",
            "fresh",
        ),
        *("knn_every", "knn_images", "linear_epochs", "max_steps", "checkpoint_minutes"),
    }:
        assert message is None
    else:
        assert f"{folder} holds a run with other settings" in message
        assert f": {name} was {value!r}, now {changed(value)!r}. " in message
        assert "--fresh" in message


def test_every_changed_setting_is_named(folder: Path) -> None:
    open_log(folder).save(at(1))
    message = refusal(folder, {**SETTINGS, "seed": 5, "epochs": 200, "device": "cuda"})
    assert "settings: epochs was 800, now 200; seed was 0, now 5. " in message
    older = {name: value for name, value in SETTINGS.items() if name != "reverse_weight"}
    message = refusal(folder, older)
    assert "settings: it has the settings reverse_weight. Continue it with the version " in message


def test_the_same_settings_continue(folder: Path) -> None:
    assert open_log(folder).load_checkpoint() is None
    open_log(folder).save(at(3))
    assert open_log(folder).load_checkpoint()["progress"]["epoch"] == 3


def test_another_number_of_images_is_refused() -> None:
    Progress(images=50_000, fingerprint="same").check_images(50_000, "same")
    with pytest.raises(UserError, match=r"with 50000 training images, now there are 49999"):
        Progress(images=50_000).check_images(49_999, "new")


def test_other_images_of_the_same_number_are_refused() -> None:
    progress = Progress(images=5, fingerprint="5 images, checksum 00000001")
    progress.check_images(5, "5 images, checksum 00000001")
    with pytest.raises(UserError, match=r"\(5 images, checksum 00000001\), now .* 00000002"):
        progress.check_images(5, "5 images, checksum 00000002")


def test_progress_comes_back_and_an_older_version_s_lacks_values() -> None:
    whole = Progress(3, 2, {"loss": 0.5}, 100, 10.0, 20.0, 30.0, [15, 2], "100 images")
    assert Progress.of(asdict(whole)) == whole
    assert Progress.of({"epoch": 3, "images": 100}) == Progress(epoch=3, images=100)


@pytest.mark.parametrize(
    "wrong", [{"epoch": "3"}, {"sums": [1.0]}, {"images": None}, {"tokens": 3}, {7: 3}]
)
def test_another_version_s_progress_is_refused(wrong: dict[Any, Any]) -> None:
    with pytest.raises(UserError, match=f"cannot use: {next(iter(wrong))}; continue with the ver"):
        Progress.of({"epoch": 3, "step": 2, **wrong})


# ---------------------------------------------------------------- config.json


def test_config_json_says_what_ran_where(folder: Path) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    open_log(folder).open(0)
    written = json.loads((folder / "config.json").read_text())
    assert written.keys() == {"config", "starts"}
    assert written["config"] == SETTINGS
    (start,) = written["starts"]
    assert start["device"] == f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    assert start["processes"] == 1
    assert start["git_commit"] is None
    assert start["versions"].pop("python") == platform.python_version()
    assert start["versions"].keys() == {"torch", "torchvision", "numpy"}
    for module in (torch, torchvision, numpy):
        # torch's own idea of its version may name the CUDA build behind a plus.
        assert module.__version__.split("+")[0] == start["versions"][module.__name__].split("+")[0]
    started = datetime.fromisoformat(start["time"])
    assert before <= started <= before + timedelta(minutes=1)


def test_config_json_keeps_the_starts_and_the_latest_settings(folder: Path) -> None:
    open_log(folder).open(0)
    open_log(folder, {**SETTINGS, "knn_every": 5}).open(0)
    written = json.loads((folder / "config.json").read_text())
    assert len(written["starts"]) == 2
    assert written["config"] == {**SETTINGS, "knn_every": 5}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_config_json_is_written_again(
    content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(folder).open(0)
    (folder / "config.json").write_bytes(content)
    open_log(folder).open(0)
    assert "config.json was damaged; earlier starts are lost" in capsys.readouterr().out
    written = json.loads((folder / "config.json").read_text())
    assert written["config"] == SETTINGS
    assert len(written["starts"]) == 1


FOREIGN = {
    "a list": ("[1, 2]", "no dict 'config'"),
    "a number": ("5", "no dict 'config'"),
    "another program's": ('{"model_type": "bert"}', "no dict 'config'"),
    "settings alone": ('{"config": {"seed": 1}}', "no list 'starts'"),
    "other types": ('{"config": {}, "starts": {"0": 1}}', "no list 'starts'"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("fresh", [False, True])
def test_another_program_s_config_json_is_refused_and_kept(
    case: str, fresh: bool, folder: Path
) -> None:
    content, missing = FOREIGN[case]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json is not of a run .* {missing}.*--run-dir"):
        open_log(folder, fresh=fresh).load_checkpoint()
    assert (folder / "config.json").read_text() == content


def git_object(repository: Path, kind: str, content: bytes) -> str:
    """Write an object of a git repository; its name."""
    whole = f"{kind} {len(content)}\0".encode() + content
    name = hashlib.sha1(whole).hexdigest()
    path = repository / ".git" / "objects" / name[:2] / name[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(whole))
    return name


@pytest.mark.parametrize("is_dirty", [False, True])
def test_the_commit_is_recorded_and_whether_files_differ(
    is_dirty: bool, folder: Path, tmp_path: Path
) -> None:
    """A repository by hand, of one commit: without a file, or with one that is missing."""
    tree = b""
    if is_dirty:
        blob = git_object(tmp_path, "blob", b"content")
        tree = b"100644 missing\0" + bytes.fromhex(blob)
    who = "A <a@b> 1700000000 +0000"
    text = f"tree {git_object(tmp_path, 'tree', tree)}\nauthor {who}\ncommitter {who}\n\nmessage\n"
    commit = git_object(tmp_path, "commit", text.encode())
    for name in ("heads", "tags"):
        (tmp_path / ".git" / "refs" / name).mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    for name in ("heads/main", "tags/v1.0"):  # a tag does not stand in for the commit
        (tmp_path / ".git" / "refs" / name).write_text(commit + "\n")

    open_log(folder).open(0)
    (start,) = json.loads((folder / "config.json").read_text())["starts"]
    assert start["git_commit"] == commit + "-dirty" * is_dirty


# ---------------------------------------------------------------- whose folder


def test_fresh_moves_aside_and_deletes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_epochs(folder, range(1, 3), values=0.5, checkpoint_after=2)
    first = contents(folder)
    assert {"config.json", "metrics.jsonl", "last.pt"} < first.keys()
    log = open_log(folder, {**SETTINGS, "another": "setting"}, fresh=True)
    assert log.load_checkpoint() is None
    assert contents(folder) == first, "nothing moves before the run is sure to start"
    capsys.readouterr()
    log.open(0)
    assert capsys.readouterr().out == f"The earlier run was moved to {folder}.1.\n"
    assert contents(folder.parent / "a run.1") == first
    log.close()
    second = contents(folder)
    assert "last.pt" not in second
    log = open_log(folder, fresh=True)
    log.open(0)
    log.close()
    assert files(folder.parent) == ["a run", "a run.1", "a run.2"]
    assert contents(folder.parent / "a run.1") == first
    assert contents(folder.parent / "a run.2") == second
    capsys.readouterr()
    log = open_log(folder.parent / "new", fresh=True)
    log.open(0)  # nothing to move
    assert files(folder.parent) == ["a run", "a run.1", "a run.2", "new"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["train/cat/1.jpg", "notes.txt", "last.pt", "metrics.jsonl"])
def test_fresh_moves_nothing_but_a_run(name: str, folder: Path) -> None:
    """The data set, say, or a checkpoint that was copied there."""
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("precious")
    with pytest.raises(UserError, match=r"is not a run's folder .*--run-dir"):
        open_log(folder, fresh=True)
    assert contents(folder) == {name: b"precious"}
    assert files(folder.parent) == ["a run"]
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize(
    "launcher", [("SLURM_JOB_ID", "SLURM"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC")]
)
def test_a_restarted_job_continues_its_fresh_run(
    launcher: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, restarter = launcher
    for other in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(other, raising=False)
    run_epochs(folder, range(1, 3), values=0.5, checkpoint_after=2)
    monkeypatch.setenv(name, "17")
    for restarts in ("0", "1", "2"):
        monkeypatch.setenv(f"{restarter}_RESTART_COUNT", restarts)
        log = open_log(folder, fresh=True)
        state = log.load_checkpoint()
        assert (state is None) == (restarts == "0")
        log.open(1)
        log.save(at(1))
        log.close()
    assert files(folder.parent) == ["a run", "a run.1"]
    # Another run is moved aside, also where the first attempt failed before that: of another job,
    # of one with other settings, or where torchrun's jobs have no names.
    other = {**SETTINGS, "seed": 7}
    assert open_log(folder, other, fresh=True).load_checkpoint() is None
    monkeypatch.setenv(name, "18")
    assert open_log(folder, fresh=True).load_checkpoint() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    config = json.loads((folder / "config.json").read_text())
    config["starts"][-1]["job"] = "none"
    (folder / "config.json").write_text(json.dumps(config))
    assert open_log(folder, fresh=True).load_checkpoint() is None


def test_fresh_moves_a_run_with_a_damaged_config_json(folder: Path) -> None:
    run_epochs(folder, range(1, 3), values=0.5, checkpoint_after=2)
    (folder / "config.json").write_text("")
    before = contents(folder)
    open_log(folder, fresh=True).open(0)
    assert contents(folder.parent / "a run.1") == before


@pytest.mark.parametrize("name", [".lock", "config.json.partial", "last.pt.partial", "views.png"])
def test_links_are_not_written_through(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    precious = folder.parent / "precious"
    precious.write_text("precious")
    (folder / name).symlink_to(precious)
    if name == ".lock":
        with pytest.raises(UserError, match=r"\.lock is not a regular file; delete it"):
            open_log(folder)
        (folder / ".lock").unlink()
    log = open_log(folder)
    log.open(0)
    log.picture("views", Image.new("RGB", (2, 2)), 0)
    log.save(at(1))
    assert precious.read_text() == "precious"
    assert not (folder / name).is_symlink()
    assert open_log(folder).load_checkpoint()["progress"] == {"epoch": 1}


@pytest.mark.parametrize("name", [".lock", "config.json", "last.pt", "previous.pt"])
def test_nothing_waits_for_a_pipe(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)

    def start() -> str | None:
        try:
            log = open_log(folder)
            log.load_checkpoint()
            log.open(0)
        except UserError as error:
            return str(error)
        return None

    told = in_child(start)
    if name == "config.json":
        assert told is None  # replaced
    else:
        assert f"{folder / name} is not a regular file" in told


@pytest.mark.parametrize("left", ["backbone.pt", "metrics.jsonl"])
def test_a_folder_whose_checkpoints_were_deleted_is_not_overwritten(
    left: str, folder: Path
) -> None:
    run_epochs(folder, range(3), values=0.5, checkpoint_after=2)
    (folder / "last.pt").rename(folder / left if left == "backbone.pt" else folder.parent / "x.pt")
    rows = rows_of(folder)
    with pytest.raises(UserError, match=rf"has {left} but no checkpoint.*--fresh"):
        open_log(folder).load_checkpoint()
    assert rows_of(folder) == rows


@pytest.mark.parametrize("fresh_before", [False, True])
def test_another_process_is_refused_until_the_first_is_gone(
    fresh_before: bool, folder: Path
) -> None:
    context = forking()
    receiving, sending = context.Pipe(duplex=False)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"config": {}, "starts": []}')

    def hold() -> None:
        log = open_log(folder, fresh=fresh_before)
        log.open(0)
        sending.send("it is mine")
        time.sleep(60)

    process = context.Process(target=hold)
    process.start()
    try:
        assert receiving.poll(60)
        before = files(folder)
        for fresh in (False, True):
            with pytest.raises(UserError, match="another process is using") as raised:
                open_log(folder, fresh=fresh)
            assert str(folder) in str(raised.value)
            assert "--run-dir" in str(raised.value)
        assert files(folder) == before
        assert files(folder.parent) == ["a run", "a run.1"][: 1 + fresh_before]
    finally:
        process.kill()  # -9: it cannot clean up behind itself
        process.join()
    assert open_log(folder).load_checkpoint() is None


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError) as raised:
            open_log(folder)
        assert f"the run directory {folder} cannot be written" in str(raised.value)
        assert "--run-dir" in str(raised.value)
    assert (tmp_path / "file").read_text() == "text"


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users may look into, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("state", ["missing", "empty", "with a lock"])
def test_a_read_only_folder(state: str, shared_folder: Path) -> None:
    folder = shared_folder / "run" if state == "missing" else shared_folder
    if state == "with a lock":  # of an earlier run; it may be taken, but nothing beside it written
        (folder / ".lock").touch()
        (folder / ".lock").chmod(0o666)
    shared_folder.chmod(0o555)
    before = files(shared_folder)

    def try_to_log() -> str:
        if os.geteuid() == 0:
            os.setuid(65534)  # nobody; root may write everywhere
        assert files(shared_folder) == before  # it is there and can be read
        with pytest.raises(UserError) as raised:
            open_log(folder)
        return str(raised.value)

    message = in_child(try_to_log)
    assert f"the run directory {folder} cannot be written (Permission denied)" in message
    assert files(shared_folder) == before


# ---------------------------------------------------------------- a full disk


def test_rows_wait_for_room(folder: Path) -> None:
    """The second row is cut short, the third not even begun; both come with the fourth."""

    def run_out_of_room() -> tuple[bytes, list[str]]:
        threading.excepthook = threading.__excepthook__  # pytest's shows nothing
        board._quiet_writers.cache_clear()
        log = open_log(folder)
        log.open(0)
        log.write(1, {"loss": 0.5})
        limit_files_to(log.metrics.size + 5)
        log.write(2, {"loss": 0.25})
        log.write(3, {"loss": 0.125})
        while_full = log.metrics.path.read_bytes()
        limit_files_to(None)
        log.write(4, {"loss": 1.0})
        return while_full, sys.stdout.getvalue().splitlines()

    while_full, told = in_child(run_out_of_room)
    assert while_full.startswith(b'{"epoch": 1, "loss": 0.5}\n')
    assert b'"epoch": 2' not in while_full
    losses = {1: 0.5, 2: 0.25, 3: 0.125, 4: 1.0}
    assert rows_of(folder) == [{"epoch": epoch, "loss": loss} for epoch, loss in losses.items()]
    assert len([line for line in told if "metrics.jsonl cannot be written now" in line]) == 2
    # TensorBoard's writer does not survive; that is said once, without a traceback of its thread.
    assert not [line for line in told if "Traceback" in line or "Exception in thread" in line]
    assert len([line for line in told if "TensorBoard's events cannot be written" in line]) == 1
    assert events_of(folder) == {"loss": [(1, 0.5)]}


def test_rows_that_waited_come_with_the_checkpoint(folder: Path) -> None:
    def run_out_of_room() -> None:
        log = open_log(folder)
        log.open(0)
        log.write(1, {"loss": 0.5})
        limit_files_to(log.metrics.size)
        log.write(2, {"loss": 0.25})
        limit_files_to(None)
        log.save(at(1))

    in_child(run_out_of_room)
    assert [row["epoch"] for row in rows_of(folder)] == [1, 2]
    rows = (folder / "metrics.jsonl").read_text()
    assert read_checkpoint(folder / "last.pt")["metrics"] == rows


def test_a_checkpoint_on_a_full_disk(folder: Path) -> None:
    """A warning within the run; at its end an error that says what to do. The last one is kept."""

    def run_out_of_room() -> tuple[list[str], str]:
        log = open_log(folder)
        told: list[str] = []
        log.tell = told.append
        log.open(0)
        log.save(at(1))
        log.save_file("best.pt", at(1))
        limit_files_to(500)
        log.save(at(2))
        log.save_file("best.pt", at(2))
        with pytest.raises(UserError) as raised:
            log.save(at(3), must=True)
        with pytest.raises(UserError, match="make room"):
            log.save_file("best.pt", at(3), must=True)
        return told, str(raised.value)

    (last, best), error = in_child(run_out_of_room)
    assert last.startswith(f"warning: {folder / 'last.pt'} cannot be written")
    assert best.startswith(f"warning: {folder / 'best.pt'} cannot be written")
    assert error.startswith(f"{folder / 'last.pt'} cannot be written")
    assert "make room" in error
    assert open_log(folder).load_checkpoint()["progress"]["epoch"] == 1
    assert read_checkpoint(folder / "best.pt") == at(1)


# ---------------------------------------------------------------- best.pt


def test_a_best_network_that_did_not_fit_is_written_with_a_later_checkpoint(folder: Path) -> None:
    weights = torch.arange(5000.0)

    def run_out_of_room() -> list[str]:
        log = open_log(folder)
        log.open(0)
        limit_files_to(10_000)
        log.save_file("best.pt", {"weights": weights, "knn": 20.0})
        weights.zero_()  # training goes on
        log.save(at(2))
        assert not (folder / "best.pt").exists()
        limit_files_to(None)
        log.save(at(3))
        return sys.stdout.getvalue().splitlines()

    told = in_child(run_out_of_room)
    assert len(told) == 2  # once for it, and once more with the checkpoint that fitted
    assert all(line.startswith(f"warning: {folder / 'best.pt'} cannot") for line in told)
    best = read_checkpoint(folder / "best.pt")
    assert torch.equal(best["weights"], torch.arange(5000.0))
    assert best["knn"] == 20.0


# What best.pt holds at a start, and the best accuracy from there on; the checkpoint's is 30.
BEST = {
    "the same": ({"knn": 30.0}, 30.0, ""),
    "of a later epoch, which is done again": ({"knn": 40.0}, 30.0, ""),
    "older, for the better one did not fit": ({"knn": 20.0}, 20.0, ""),
    "deleted": (None, None, "no such checkpoint"),
    "damaged": (b"damaged", None, "is damaged"),
    "another file": ({"weights": 1.0}, None, "has no accuracy 'knn'"),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_accuracy_is_the_one_in_the_file(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected, problem = BEST[case]
    log = open_log(folder)
    log.open(0)
    log.save({"progress": {"epoch": 3, "best_knn": 30.0}})
    if isinstance(content, bytes):
        (folder / "best.pt").write_bytes(content)
    elif content is not None:
        log.save_file("best.pt", content)
    log.close()
    capsys.readouterr()
    assert open_log(folder).load_checkpoint()["progress"]["best_knn"] == expected
    told = capsys.readouterr().out
    if expected is None:
        assert told.startswith(f"warning: {folder / 'best.pt'}")
        assert f"{problem}" in told
        assert told.endswith("; the next evaluation of kNN writes a new best.pt\n")
    else:
        assert told == ""


# ---------------------------------------------------------------- what is told


def test_collapse_is_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(folder)
    warned = []
    for epoch, spread in enumerate((0.9, 0.1, 0.099, 0.05, 0.9, 0.01), start=1):
        log.tell_epoch(epoch, 6, {"loss": -0.5, "spread": spread})
        line, *warning = capsys.readouterr().out.splitlines()
        assert line == f"epoch {epoch}/6: loss -0.5, spread {spread:.4g}"
        warned += [(epoch, text) for text in warning]
    ((epoch, text),) = warned
    assert epoch == 3
    assert re.match(r"warning: the representation has collapsed \(spread 0\.099", text)


def test_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(folder)
    log.tell_result(Progress(knn=61.25, untrained_knn=31.5), linear=70.125)
    told = capsys.readouterr().out
    assert re.search(r"^kNN accuracy +61\.25 %$", told, re.MULTILINE)
    assert re.search(r"^ +untrained +31\.50 %$", told, re.MULTILINE)
    assert re.search(r"^linear accuracy +70\.12 %$", told, re.MULTILINE)
    for name in ("views.png", "backbone.pt", "metrics.jsonl"):
        assert re.search(rf" {re.escape(str(folder / name))}$", told, re.MULTILINE)
    log.tell_result(Progress(), linear=None)
    assert "accuracy" not in capsys.readouterr().out
