"""common/data/fingerprint.py, and two real processes that find different images."""

from __future__ import annotations

import os
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from common.data.fingerprint import fingerprint, is_same_set, require_same_images
from common.data.in_memory import load_images
from common.data.photographs import find_photographs
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from processes import forking

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_number_and_checksum_of_the_names() -> None:
    names = ["cat/0.png", os.fsdecode(b"dog/\xff.png")]
    checksum = zlib.crc32(b"cat/0.png\0dog/\xff.png\0")
    assert fingerprint(names) == f"2 images, checksum {checksum:08x}"
    assert fingerprint(iter(names)) == fingerprint(names)
    others = [names[::-1], ["cat/0.png"], ["cat/0.pngdog/", "\xff.png"], ["dog/0.png", names[1]]]
    assert len({fingerprint(other) for other in [*others, names]}) == 5
    require_same_images(fingerprint(names), "somewhere", ALONE)


def test_other_files_of_the_same_names_are_another_set(tmp_path: Path) -> None:
    """Three are looked at. One that was broken may be restored; an older run has only the names."""
    names = [f"{index}.png" for index in range(5)]
    files = [tmp_path / name for name in names]
    for path in files:
        path.write_bytes(path.name.encode())
    whole = fingerprint(names, files)
    sums = [f"{zlib.crc32(names[index].encode()):08x}" for index in (0, 2, 4)]
    assert whole == f"{fingerprint(names)}, contents {' '.join(sums)}"
    files[1].write_bytes(b"not looked at")
    assert fingerprint(names, files) == whole
    files[0].write_bytes(b"restored")
    files[4].unlink()
    assert is_same_set(whole, fingerprint(names, files))
    assert is_same_set(fingerprint(names), whole)
    assert not is_same_set(fingerprint(names[1:]), whole)
    files[2].write_bytes(b"other")
    assert not is_same_set(whole, fingerprint(names, files))
    assert fingerprint(["0.png"], files[:1]).count(" ") == 5


def test_the_same_folder_elsewhere_is_the_same_set(folder: Path, tmp_path: Path) -> None:
    """On whatever path, read as photographs or into memory; another name is another set."""
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)

    def found(root: Path) -> set[str]:
        data = load_images("folder", str(root), 32, 0, False, 1, ALONE)
        photographs = find_photographs("folder", str(root), 32, 0, 1, "train", ALONE)
        return {data.train.fingerprint, photographs.fingerprint}

    assert found(moved) == found(folder)
    assert len(found(folder)) == 1
    first = sorted((moved / "train").rglob("*.png"))[0]
    first.rename(first.with_name("renamed.png"))
    assert not found(moved) & found(folder)


def test_generated_sets_differ_by_seed_and_split() -> None:
    seen = set()
    for seed in (0, 1):
        for split in ("train", "val"):
            seen.add(find_photographs("shapes", "", 8, seed, 1, split, ALONE).fingerprint)
    assert len(seen) == 4
    data = load_images("shapes", "", 8, 0, False, 1, ALONE)
    assert {data.train.fingerprint, data.test.fingerprint} < seen


def on_two_ranks(roots: list[Path], tmp_path: Path) -> list[str]:
    """What each of two processes says when it lists its own folder."""
    context = forking()
    said = context.Queue()

    def list_on(rank: int) -> None:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        ranks = Ranks(rank, 2, ALONE.device)
        try:
            find_photographs("folder", str(roots[rank]), 32, 0, 1, "train", ranks)
            said.put((rank, ""))
        except UserError as error:
            said.put((rank, str(error)))
        ranks.wait()

    processes = [context.Process(target=list_on, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return [text for _, text in sorted(said.get(timeout=60) for _ in processes)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


@pytest.mark.parametrize("change", ["none", "one less", "renamed", "other contents"])
def test_processes_that_find_different_images_all_stop(
    change: str, folder: Path, tmp_path: Path
) -> None:
    """One file less hung a run in the epoch's last step; another name trained on other images."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    first = sorted((other / "train").rglob("*.png"))[0]
    if change == "one less":
        first.unlink()
    elif change == "renamed":
        first.rename(first.with_name("renamed.png"))
    elif change == "other contents":
        first.write_bytes(b"as in another resolution")
    said = on_two_ranks([folder, other], tmp_path)
    if change == "none":
        assert said == ["", ""]
        return
    if change == "other contents":
        assert all("files of the same names and other contents" in text for text in said)
        return
    counts = (200, 199 if change == "one less" else 200)
    for text in said:
        found = re.findall(r"process (\d) found (\d+) images, checksum ([0-9a-f]{8})", text)
        assert [(int(rank), int(count)) for rank, count, _ in found] == [*enumerate(counts)]
        assert found[0][2] != found[1][2]
        assert text.endswith("; give every machine the same files")
