"""common/training/checkpoint.py under real kills, real damage and a real lack of room."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import random
import re
import signal
import stat
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.runtime.errors import UserError
from common.runtime.files import write_whole
from common.training.checkpoint import Checkpoints, read_checkpoint, restore, serialise
from processes import files, forking, in_child, limit_files_to

torch.set_num_threads(1)

State = dict[str, Any]


ENTRIES = {"number": int, "model": dict}


def state_of(number: int, elements: int = 1000) -> State:
    """A state from which its number can be told in every place."""
    return {"number": number, "model": {"weight": torch.full((elements,), float(number))}}


def assert_is(state: State | None, number: int) -> None:
    assert state is not None
    assert state["number"] == number
    assert (state["model"]["weight"] == number).all()


def bytes_on_disk(folder: Path) -> int:
    """What the files take up; two names of one file count once."""
    entries = [path.stat() for path in folder.iterdir()]
    return sum({entry.st_ino: entry.st_size for entry in entries}.values())


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With hard links, and on a file system that has none."""
    if not request.param:

        def refuse(source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return request.param


# ---------------------------------------------------------------- saving and loading


def test_nothing_to_continue_from(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load(ENTRIES) is None
    assert Checkpoints(tmp_path / "missing").load(ENTRIES) is None
    with pytest.raises(UserError, match=r"last\.pt: no such checkpoint"):
        read_checkpoint(tmp_path / "last.pt")


def test_previous_is_the_one_before_last(tmp_path: Path, links: bool) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1))
    assert files(tmp_path) == ["last.pt"]
    for number in (2, 3, 4):
        checkpoints.save(state_of(number))
        assert files(tmp_path) == ["last.pt", "previous.pt"]
        assert_is(checkpoints.load(ENTRIES), number)
        assert_is(read_checkpoint(tmp_path / "previous.pt"), number - 1)


def test_what_comes_back_is_what_was_saved(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "model": {"weight": weight, "half": weight.bfloat16(), "count": torch.tensor(3)},
        "optimiser": {"state": {0: {"momentum_buffer": -weight}}, "param_groups": [{"lr": 0.1}]},
        "progress": {"epoch": 7, "knn": None, "sums": {"loss": -0.1}, "name": "T̂", "flag": True},
    }
    Checkpoints(tmp_path).save(state)
    loaded = Checkpoints(tmp_path).load({"progress": dict})
    assert loaded["progress"] == state["progress"]
    assert loaded["optimiser"]["param_groups"] == [{"lr": 0.1}]
    assert torch.equal(loaded["optimiser"]["state"][0]["momentum_buffer"], -weight)
    for name, value in state["model"].items():
        assert loaded["model"][name].dtype == value.dtype
        assert torch.equal(loaded["model"][name], value)


def test_other_names_do_not_meet(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(state_of(1))
    linear = Checkpoints(tmp_path, "linear_last.pt", "linear_previous.pt")
    assert linear.load(ENTRIES) is None
    linear.save(state_of(2))
    linear.save(state_of(3))
    assert_is(Checkpoints(tmp_path).load(ENTRIES), 1)
    assert files(tmp_path) == ["last.pt", "linear_last.pt", "linear_previous.pt"]


# ---------------------------------------------------------------- at every moment


def test_a_new_one_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fsync a power cut could leave the new name on an empty file."""
    path = tmp_path / "last.pt"
    write_whole(path, serialise(state_of(1)))
    really_sync = os.fsync
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        really_sync(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            assert_is(read_checkpoint(path), 2)  # the folder follows, for the name itself
        else:
            assert_is(read_checkpoint(path), 1)
            beside = tmp_path / "last.pt.partial"
            assert beside.stat().st_ino == status.st_ino
            assert_is(read_checkpoint(beside), 2)
        synced.append(status.st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, serialise(state_of(2)))
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    assert files(tmp_path) == ["last.pt"]


def test_never_three_of_them(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    really_sync = os.fsync
    most: list[int] = []

    def sync(descriptor: int) -> None:
        really_sync(descriptor)  # the moment at which the new one is whole, and still beside
        most.append(bytes_on_disk(tmp_path))

    monkeypatch.setattr(os, "fsync", sync)
    checkpoints.save(state_of(1))
    size = bytes_on_disk(tmp_path)
    for number in (2, 3, 4, 5):
        checkpoints.save(state_of(number))
    assert max(most) == 2 * size
    assert bytes_on_disk(tmp_path) == 2 * size


def test_kill_9_at_any_moment(tmp_path: Path, links: bool) -> None:
    """Each process continues from what the one before it left, and is killed in its turn."""
    context = forking()
    moments = random.Random(0)

    def save_without_end(first: int) -> None:
        checkpoints = Checkpoints(tmp_path)
        for number in itertools.count(first):
            checkpoints.save(state_of(number, elements=100_000))
            sending.send(number)

    reached = 0
    for _ in range(15):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=save_without_end, args=(reached + 1,))
        process.start()
        assert receiving.poll(60)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while receiving.poll():
            reported = receiving.recv()
        receiving.close()
        sending.close()

        state = Checkpoints(tmp_path).load(ENTRIES)
        assert state["number"] in (reported, reported + 1), "a checkpoint that was saved is lost"
        reached = state["number"]
        assert_is(state, reached)
        if links:
            assert_is(read_checkpoint(tmp_path / "last.pt"), reached)
        if (tmp_path / "previous.pt").exists():
            # The same one if the kill came while the next one was being written.
            number = read_checkpoint(tmp_path / "previous.pt")["number"]
            assert_is(read_checkpoint(tmp_path / "previous.pt"), number)
            assert number in (reached - 1, reached)
        assert bytes_on_disk(tmp_path) < 2.1 * 400_000  # two of 100,000 float32, never three


# ---------------------------------------------------------------- damage


def cut_off(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_in_a_tensor(content: bytes) -> bytes:
    """Flip one bit in the middle of the weight, whose bytes in the file are those in memory."""
    number = torch.full((1000,), 2.0).numpy().tobytes()
    middle = content.index(number) + len(number) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": cut_off,
    "last byte missing": lambda content: content[:-1],
    "flipped in a tensor": flip_in_a_tensor,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: random.Random(0).randbytes(len(content)),
    "text": lambda content: b"<html>404 Not Found</html>",
}


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGES)
def test_previous_takes_over_from_a_damaged_last(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1))
    checkpoints.save(state_of(2))
    assert_is(checkpoints.load(ENTRIES), 2)
    assert capsys.readouterr().out == ""
    damage(checkpoints.last, kind)
    assert_is(checkpoints.load(ENTRIES), 1)
    (message,) = capsys.readouterr().out.splitlines()
    assert message.startswith(f"warning: {checkpoints.last} is damaged")
    assert message.endswith(f"continuing from {checkpoints.previous}")
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        read_checkpoint(checkpoints.last)


@pytest.mark.parametrize("kind", DAMAGES)
def test_where_nothing_can_be_read_an_error_names_both(kind: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(2))
    checkpoints.save(state_of(2))
    damage(checkpoints.last, kind)
    damage(checkpoints.previous, kind)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as raised:
        checkpoints.load(ENTRIES)
    assert str(checkpoints.last) in str(raised.value)
    assert str(checkpoints.previous) in str(raised.value)
    assert "--fresh" in str(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_last_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1))
    damage(checkpoints.last, "cut off")
    with pytest.raises(UserError, match="--fresh"):
        checkpoints.load(ENTRIES)


def test_a_missing_last_leaves_the_previous_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1))
    checkpoints.save(state_of(2))
    checkpoints.last.unlink()
    assert_is(checkpoints.load(ENTRIES), 1)


def flipped_states(path: Path, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The places (byte, bit) at which a flip goes unnoticed and changes what is read."""
    content = path.read_bytes()
    wrong = []
    for byte, bit in places:
        flipped = bytearray(content)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            state = read_checkpoint(path)
        except UserError:
            continue
        weight = state["model"]["weight"]
        if state["number"] != 3 or weight.shape != (20,) or not (weight == 3).all():
            wrong.append((byte, bit))
    return wrong


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_whole(path, serialise(state_of(3, elements=20)))
    chance = random.Random(0)
    size = path.stat().st_size
    places = [(chance.randrange(size), chance.randrange(8)) for _ in range(300)]
    assert flipped_states(path, places) == []


def test_a_tensor_that_becomes_a_folder_is_noticed(tmp_path: Path) -> None:
    """The one bit of a tensor's entry that no checksum covers: its DOS attribute "directory"."""
    path = tmp_path / "last.pt"
    write_whole(path, serialise(state_of(3, elements=20)))
    content = path.read_bytes()
    name = content.rindex(b"data/0")  # the central directory is at the file's end
    entry = content.rindex(b"PK\x01\x02", 0, name)
    assert flipped_states(path, [(entry + 38, 4)]) == []


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def save_pickled(state: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(state))


def save_in_old_format(state: Any, path: Path) -> None:
    """As torch before 1.6."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMATS = {"now": torch.save, "before torch 1.6": save_in_old_format, "pickle": save_pickled}


@pytest.mark.parametrize("kind", FORMATS)
def test_code_in_a_checkpoint_is_refused_and_never_run(kind: str, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    state = {**state_of(1), "model": Harmful(proof)}
    pickle.loads(pickle.dumps(state))
    assert proof.exists(), "it would run"
    proof.unlink()
    checkpoints = Checkpoints(tmp_path)
    FORMATS[kind](state, checkpoints.last)
    with pytest.raises(UserError, match=r"last\.pt") as raised:
        checkpoints.load(ENTRIES)
    assert not proof.exists()
    # Nothing of torch's own message, which tells how to have it executed.
    assert not re.search("weights_only|trust|safe_globals", str(raised.value))
    assert len(str(raised.value)) < 400 + 2 * len(str(tmp_path))
    if kind != "pickle":
        assert re.search(r"more than tensors and plain values, [\w.]*getattr,", str(raised.value))
        assert "damaged" not in str(raised.value)


def test_a_compiled_module_is_refused(tmp_path: Path) -> None:
    """A zip file of torch's too, of another kind."""
    path = tmp_path / "module.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
        with pytest.raises(UserError, match="holds more than tensors") as raised:
            read_checkpoint(path)
    assert "weights_only" not in str(raised.value)


def test_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    save_in_old_format(state_of(3), path)
    assert_is(read_checkpoint(path), 3)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"old\.pt is"):
        read_checkpoint(path)


# ---------------------------------------------------------------- valid files of another kind

OTHERS: dict[str, tuple[Any, str]] = {
    "a tensor": (torch.zeros(3), "it holds a Tensor, not a dictionary with names as keys"),
    "a list": ([1, 2], "it holds a list, not a dictionary"),
    "integer keys": ({0: 1.0}, "it holds a dict, not a dictionary with names as keys"),
    "weights": ({"conv.weight": torch.zeros(3)}, "it has no entry 'number'"),
    "an older version's": ({"number": 3}, "it has no entry 'model'"),
    "another type": ({"number": "3", "model": {}}, "its entry 'number' is a str, not a int"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_valid_file_of_another_kind_is_refused_and_kept(case: str, tmp_path: Path) -> None:
    content, message = OTHERS[case]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1))
    checkpoints.save(state_of(2))
    torch.save(content, checkpoints.last)
    before = checkpoints.last.read_bytes()
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        checkpoints.load(ENTRIES)
    assert str(checkpoints.last) in str(raised.value)
    assert checkpoints.last.read_bytes() == before


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.pt")
    for read in (
        lambda: Checkpoints(tmp_path).load({}),
        lambda: read_checkpoint(tmp_path / "last.pt"),
    ):

        def refused(read: Callable[[], Any] = read) -> str:
            with pytest.raises(UserError) as raised:
                read()
            return str(raised.value)

        assert "last.pt is not a regular file" in in_child(refused)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        closed, path = Path(name) / "closed", Path(name) / "last.pt"
        closed.mkdir(mode=0)
        torch.save({}, path)
        torch.save({}, Path(name) / "previous.pt")
        (Path(name) / "previous.pt").chmod(0o644)
        path.chmod(0)
        Path(name).chmod(0o755)

        def refused() -> list[str]:
            if os.geteuid() == 0:
                os.setuid(65534)  # nobody; root may read everything
            messages = []
            for one in (path, closed / "last.pt"):
                with pytest.raises(UserError) as raised:
                    read_checkpoint(one)
                messages.append(str(raised.value))
            for folder in (path.parent, closed):  # the one before it is not taken in its place
                with pytest.raises(UserError, match=r"it may be intact: repeat the command"):
                    Checkpoints(folder).load({})
            return messages

        assert in_child(refused) == [
            f"{path} cannot be read (Permission denied)",
            f"{closed / 'last.pt'} cannot be read (Permission denied)",
        ]
        closed.chmod(0o755)


def test_a_disk_that_fails_in_the_middle_of_a_file_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for epoch in (1, 2):
        checkpoints.save({"epoch": epoch})

    def fail(archive: zipfile.ZipFile) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "testzip", fail)
        with pytest.raises(
            UserError, match=r"last\.pt cannot be read \(Stale file handle\); it may"
        ):
            checkpoints.load({"epoch": int})
    assert checkpoints.load({"epoch": int}) == {"epoch": 2}


def test_another_zip_archive_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/cat/0.jpg", b"")
    with pytest.raises(UserError, match=r"another kind of file: a zip archive without weights"):
        read_checkpoint(path)


def test_a_state_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    module = torch.nn.Linear(2, 3)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    parts = {"model": module, "optimiser": optimiser}
    saved = {name: part.state_dict() for name, part in parts.items()}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": torch.nn.Linear(2, 4).state_dict()}, "its 'model' does not fit (size mismatch"),
        ({"model": {"weight": saved["model"]["weight"]}}, "does not fit (Missing key(s)"),
        ({"model": {"weight": 1, "bias": 2}}, "its 'model' does not fit"),
        ({"model": [1]}, "its entry 'model' is a list"),
        ({"optimiser": {}}, "its 'optimiser' does not fit"),
        ({"optimiser": {"state": {}, "param_groups": []}}, "its 'optimiser' does not fit"),
    ]
    for change, message in wrong:
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            restore(parts, {**saved, **change}, path)
        assert str(raised.value).startswith(f"{path}")
        assert len(str(raised.value)) < 300 + len(str(path))
    with pytest.raises(UserError, match="it has no entry 'optimiser'"):
        restore(parts, {"model": saved["model"]}, path)
    other = torch.nn.Linear(2, 3)
    restore({"model": other}, saved, path)
    assert torch.equal(other.weight, module.weight)


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("room", [0, 1, 700, 9000, 20_000, -2500, -500, -1])
def test_a_full_disk_leaves_the_last_one_and_no_litter(
    room: int, tmp_path: Path, links: bool
) -> None:
    """Room for some bytes of a checkpoint, or for all but some.

    40 kB do not fit a file's buffer, so that writing fails in every place where it can: in Python's
    buffer, in the middle of a tensor (torch then raises a RuntimeError) and in the last flush.
    """
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1, elements=10_000))
    checkpoints.save(state_of(2, elements=10_000))
    size = checkpoints.last.stat().st_size

    def run_out_of_room() -> None:
        limit_files_to(room % size)
        with pytest.raises(OSError):  # noqa: PT011 (its number depends on where it fails)
            checkpoints.save(state_of(3, elements=10_000))

    in_child(run_out_of_room)
    assert_is(checkpoints.load(ENTRIES), 2)
    assert files(tmp_path) == (["last.pt", "previous.pt"] if links else ["previous.pt"])
    checkpoints.save(state_of(3, elements=10_000))  # there is room again
    assert_is(checkpoints.load(ENTRIES), 3)
    assert_is(read_checkpoint(checkpoints.previous), 2)


def test_a_disk_that_stays_full_collects_no_litter(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(1))
    checkpoints.save(state_of(2))

    def run_out_of_room_twice() -> None:
        limit_files_to(1000)
        for number in (3, 4):
            with pytest.raises(OSError):  # noqa: PT011
                checkpoints.save(state_of(number))

    in_child(run_out_of_room_twice)
    assert_is(checkpoints.load(ENTRIES), 2)
    assert files(tmp_path) == ["last.pt", "previous.pt"]
    checkpoints.save(state_of(3))
    assert files(tmp_path) == ["last.pt", "previous.pt"]


def test_room_for_exactly_one_is_enough(tmp_path: Path) -> None:
    write_whole(tmp_path / "last.pt", serialise(state_of(1)))
    size = (tmp_path / "last.pt").stat().st_size

    def save() -> None:
        limit_files_to(size)
        write_whole(tmp_path / "last.pt", serialise(state_of(2)))

    in_child(save)
    assert_is(read_checkpoint(tmp_path / "last.pt"), 2)


def test_a_full_disk_at_the_very_first_one(tmp_path: Path) -> None:
    def run_out_of_room() -> list[str]:
        limit_files_to(1000)
        with pytest.raises(OSError):  # noqa: PT011
            Checkpoints(tmp_path).save(state_of(1))
        return files(tmp_path)

    assert in_child(run_out_of_room) == []
    assert Checkpoints(tmp_path).load(ENTRIES) is None


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "last.pt", serialise(state_of(1)))
