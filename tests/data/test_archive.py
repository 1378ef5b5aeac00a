"""common/data/archive.py: zip archives that zipfile writes, whole, damaged and hostile ones."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.data.archive import LARGEST, Archive
from common.data.decoding import BrokenFile, decode
from common.data.fingerprint import fingerprint
from common.data.folder import Folder
from common.data.in_memory import load_images
from common.data.listing import find_split, has_folder, open_root
from common.data.loader import CropLoader, Loading
from common.data.photographs import RandomCrops
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from pillow_reference import pictures, to_pillow
from processes import forking

ALONE = Ranks(0, 1, torch.device("cpu"))
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
OTHER_NAMES = [".hidden.png", ".thumbs/0.png", "cat/.x/0.png", "dog/notes.txt", "é.csv"]


class RawName(zipfile.ZipInfo):
    """An entry whose name is stored as it is: zipfile would refuse or change some."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
        return os.fsencode(self.filename), self.flag_bits


def put(folder: Path, *names: str) -> None:
    """Each name with a picture of its own."""
    for name, image in zip(names, to_pillow(pictures(len(names), (40, 40))), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")


def pack(
    folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED, below: str = "", seed: int = 0
) -> Path:
    """Write all files of a folder into an archive, in a random order; stored ones with a note."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    random.Random(seed).shuffle(files)
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in files:
            entry = RawName(below + file.relative_to(folder).as_posix())
            entry.external_attr = 0o100644 << 16
            if method == zipfile.ZIP_STORED:
                entry.extra = struct.pack("<2H200x", 0xCAFE, 200)
            archive.writestr(entry, file.read_bytes(), method)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A labelled folder with names of every kind, and files that are not used."""
    root = tmp_path / "set"
    not_utf_8 = os.fsdecode(b"dog/\xff.png")
    put(root / "train", "cat/0.png", "cat/a/é.PNG", "cat-a/1.png", not_utf_8, *OTHER_NAMES)
    put(root / "val", "dog/0.png", "cat/1.png")
    return root


@pytest.mark.parametrize("below", ["", "photos/"])
@pytest.mark.parametrize("method", METHODS)
def test_an_archive_has_the_images_of_its_folder(
    method: int, below: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names in the same order, labels, pixels and report, whatever the entries' order."""
    packed = pack(root, tmp_path / "X.zip", method, below)
    top = tmp_path / "X.zip" / below
    for split, count in (("train", 4), ("val", 2)):
        ours = find_split(packed, split, ALONE)
        said = capsys.readouterr().out
        theirs = find_split(root, split, ALONE)
        assert said.replace(str(top), str(root)) == capsys.readouterr().out
        assert len(ours.files) == len(ours.names) == count
        assert ours.folder == top / split
        fields = ("names", "labels", "class_names", "stray", "is_whole")
        assert [getattr(ours, name) for name in fields] == [
            getattr(theirs, name) for name in fields
        ]
        for file, expected in zip(ours.files, theirs.files, strict=True):
            assert torch.equal(decode(file), decode(expected))
            assert os.fspath(file) == str(expected).replace(str(root), str(top))
    assert said.count("Not used") == 0  # val/ has nothing else
    assert has_folder(packed, "val")


def test_what_is_not_used_is_told_as_of_a_folder(root: Path, tmp_path: Path) -> None:
    ours = open_root(pack(root, tmp_path / "X.zip")).folder("train").find()
    assert ours.left_out == {
        "hidden files and folders": [".hidden.png", ".thumbs", "cat/.x"],
        "files of other kinds": ["dog/notes.txt", "é.csv"],
    }
    theirs = Folder(root / "train").find()
    assert [*ours.left_out.items()] == [*theirs.left_out.items()]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["Train/cat/0.png", "val/cat/0.png"], "{root} holds Train/; rename it to train/"),
        (["val/cat/0.png"], "{root} holds val/ but no train/"),
        (["x/y/train/0.png", "x/y/val/0.png"], "give --data-root {root}/x/y"),
        (["x/train/0.png", "x/val/0.png", "z/0.png"], "give --data-root {root}/x"),
        (["a.heic"], "{root}: no images in {root}, but 1 files of other kinds (a.heic)"),
    ],
)
def test_layouts_are_refused_as_of_a_folder(
    names: list[str], sentence: str, tmp_path: Path
) -> None:
    put(tmp_path / "set", *names)
    packed = pack(tmp_path / "set", tmp_path / "X.zip")
    with pytest.raises(UserError) as caught:
        find_split(packed, "train", ALONE)
    assert sentence.format(root=packed) in str(caught.value)
    _, _, remedy = str(caught.value).partition("give --data-root ")
    if remedy.startswith(str(packed)):
        assert len(find_split(Path(remedy), "train", ALONE).names) == 1
    with pytest.raises(UserError, match=r"X\.zip/nowhere: no such folder"):
        find_split(packed / "nowhere", "train", ALONE)


def test_images_without_classes_and_a_single_folder_around_them(tmp_path: Path) -> None:
    """As macOS packs a folder: with its name, and with a folder of hidden files beside it."""
    put(tmp_path / "set", "photos/b/1.png", "photos/0.png", "__MACOSX/photos/._0.png")
    listing = find_split(pack(tmp_path / "set", tmp_path / "X.zip"), "train", ALONE)
    assert listing.names == ["0.png", "b/1.png"]
    assert (listing.is_whole, listing.class_names, listing.stray) == (True, (), "0.png")
    assert listing.folder == tmp_path / "X.zip" / "photos"
    flat = find_split(pack(tmp_path / "set" / "photos", tmp_path / "Y.zip"), "train", ALONE)
    assert fingerprint(flat.names) == fingerprint(listing.names)


def test_names_may_begin_with_the_current_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "0.png")
    with zipfile.ZipFile(tmp_path / "X.zip", "w") as archive:
        archive.writestr(RawName("./"), b"")
        for name in ("./train/cat/0.png", "././train/dog/1.png"):
            archive.writestr(RawName(name), (tmp_path / "0.png").read_bytes())
    listing = find_split(tmp_path / "X.zip", "train", ALONE)
    assert listing.names == ["cat/0.png", "dog/1.png"]
    assert "Not used" not in capsys.readouterr().out
    expected = decode(tmp_path / "0.png")
    assert all(torch.equal(decode(file), expected) for file in listing.files)


def test_hostile_entries_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "0.png", "1.png")
    old, new = (tmp_path / name for name in ("0.png", "1.png"))
    unsafe = [
        *("/etc/0.png", "../0.png", "cat/../../0.png", "cat/./0.png", "cat//0.png"),
        *("cat\\0.png", "cat/0.png\0.txt", "a/" * 2047 + "0.png"),
    ]
    packed = tmp_path / "X.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for name in [*unsafe, "train/cat/0.png", "train/cat/link.png", "train/cat/huge.png"]:
            entry = RawName(name)
            entry.filename = name  # ZipInfo cuts a name at a zero byte
            is_link = name in ("train/cat/0.png", "train/cat/link.png")
            entry.external_attr = (0o120777 if is_link else 0o100644) << 16
            archive.writestr(entry, old.read_bytes())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(new, "train/cat/0.png")
        archive.getinfo("train/cat/huge.png").file_size = LARGEST + 1
    listing = find_split(packed, "train", ALONE)
    assert listing.names == ["cat/0.png"]
    assert torch.equal(decode(listing.files[0]), decode(new))  # the later one, as when unpacked
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"Found 1 images of 1 class in {packed}/train.",
        "  Not used: 8 entries whose names are no relative paths with '/' "
        "(/etc/0.png, ../0.png, cat/../../0.png, …).",
        "  Not used: 1 entries that a later one of the same name replaces (cat/0.png).",
        "  Not used: 1 larger than 512 MiB (cat/huge.png).",
        "  Not used: 1 not regular files (cat/link.png).",
    ]


def patch(position: int, form: str, *values: int) -> Callable[[bytearray, int, int], None]:
    """Overwrite a field of the first entry's header in the directory."""

    def change(content: bytearray, local: int, central: int) -> None:
        struct.pack_into(form, content, central + position, *values)

    return change


def flip(content: bytearray, local: int, central: int) -> None:
    content[central - 20] ^= 1  # the last bytes before the directory are the image's


def swap_name(content: bytearray, local: int, central: int) -> None:
    content[local + 30] ^= 1


DAMAGES = {
    "checksum": (flip, METHODS[0], "its size or checksum differs"),
    "encrypted": (patch(8, "<H", 1), METHODS[0], "it is encrypted"),
    "method": (patch(10, "<H", 12), METHODS[0], "compression method 12 is neither store nor"),
    "claims less": (patch(24, "<L", 5), METHODS[1], "its size or checksum differs"),
    "claims more": (patch(24, "<L", 10**6), METHODS[1], "its size or checksum differs"),
    "packed less": (patch(20, "<L", 30), METHODS[1], "its size or checksum differs"),
    "packed is stored": (patch(10, "<H", 8), METHODS[0], "compressed content is damaged"),
    "elsewhere": (patch(42, "<L", 3), METHODS[0], "has something else in its place"),
    "beyond the end": (patch(42, "<L", 10**6), METHODS[0], "the archive ends before it"),
    "another name": (swap_name, METHODS[0], "has something else in its place"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_entry_is_named_as_a_file_is(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, method, reason = DAMAGES[damage]
    put(tmp_path / "set", "a.png")
    packed = pack(tmp_path / "set", tmp_path / "X.zip", method)
    content = bytearray(packed.read_bytes())
    change(content, content.index(b"PK\3\4"), content.index(b"PK\1\2"))
    packed.write_bytes(content)
    with pytest.raises(BrokenFile, match=rf"X\.zip/a\.png cannot be decoded \(.*{reason}.*\)$"):
        decode(open_root(packed).files(["a.png"])[0])

    put(tmp_path / "other", "b.png")
    with zipfile.ZipFile(packed, "a") as archive:  # the damage stays; a sound entry comes after it
        archive.write(tmp_path / "other" / "b.png", "b.png")
    with pytest.raises(UserError, match=r"X\.zip/a\.png cannot be decoded .*--skip-broken$"):
        load_images("folder", str(packed), 40, 0, False, 1, ALONE)
    train, _ = load_images("folder", str(packed), 40, 0, True, 1, ALONE)
    assert torch.equal(train.images[0], decode(tmp_path / "other" / "b.png"))
    assert f"Left out 1 broken files of {packed}: a.png\n" in capsys.readouterr().out


def test_an_archive_that_is_cut_off_anywhere_is_refused(root: Path, tmp_path: Path) -> None:
    packed = pack(root / "val", tmp_path / "X.zip")
    content = packed.read_bytes()
    for length in range(0, len(content), 31):
        packed.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"X\.zip is not a complete zip archive \(.*\); copy"):
            Archive(packed)


@pytest.mark.parametrize(
    ("record", "position", "reason"),
    [
        (b"PK\5\6", 10, "it states 514 entries and has 2"),
        (b"PK\5\6", 4, "it is one part of several"),
        (b"PK\5\6", 16, "a part of it is missing"),
        (b"PK\1\2", 0, "no header"),
        (b"PK\1\2", 32, "the directory ends within a header"),
    ],
)
def test_a_directory_that_contradicts_itself_is_refused(
    record: bytes, position: int, reason: str, root: Path, tmp_path: Path
) -> None:
    packed = pack(root / "val", tmp_path / "X.zip")
    content = bytearray(packed.read_bytes())
    content[content.rindex(record) + position + 1] += 2
    packed.write_bytes(content)
    with pytest.raises(UserError, match=rf"X\.zip is not a complete zip archive \({reason}\)"):
        Archive(packed)


def test_whatever_byte_is_damaged_nothing_else_is_read(root: Path, tmp_path: Path) -> None:
    """Either the archive is refused, or an entry is told, or its bytes are right."""
    packed = pack(root / "val", tmp_path / "X.zip")
    content = packed.read_bytes()
    names = Folder(root / "val").find().names
    right = {(root / "val" / name).read_bytes() for name in names}
    outcomes = set()
    for position in range(content.index(b"PK\1\2"), len(content)):
        for value in (0, 255):
            damaged = bytearray(content)
            damaged[position] = value
            packed.write_bytes(damaged)
            try:
                listing = find_split(packed, "train", ALONE)
                for file in listing.files:
                    decode(file)
                    assert file.read().tobytes() in right
                outcomes.add("read")
            except (UserError, BrokenFile) as error:
                outcomes.add(type(error).__name__)
    assert outcomes == {"read", "UserError", "BrokenFile"}


def test_large_archives_and_data_before_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zipfile writes 64-bit records as for archives of gigabytes and of 65,536 entries."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 200)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    packed = pack(root / "val", tmp_path / "X.zip", zipfile.ZIP_STORED)
    content = packed.read_bytes()
    assert b"PK\6\6" in content
    for before in (b"", b"#!/bin/sh\n" * 5):
        packed.write_bytes(before + content)
        listing = find_split(packed, "train", ALONE)
        assert listing.names == ["cat/1.png", "dog/0.png"]
        for file, name in zip(listing.files, listing.names, strict=True):
            assert file.read().tobytes() == (root / "val" / name).read_bytes()


def test_each_process_and_thread_has_a_position_of_its_own(root: Path, tmp_path: Path) -> None:
    """With a shared one, a read between another's seek and read would mix bytes."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc on this system")
    packed = pack(root, tmp_path / "X.zip")
    files = find_split(packed, "train", ALONE).files
    expected = [file.read().tobytes() for file in files]
    handles = [link for link in Path("/proc/self/fd").iterdir() if link.resolve() == packed]
    positions = [os.lseek(int(handle.name), 0, os.SEEK_CUR) for handle in handles]
    assert positions[0] > 0

    def read_all() -> None:
        for file, content in zip(files, expected, strict=True):
            assert file.read().tobytes() == content
            assert [os.lseek(int(handle.name), 0, os.SEEK_CUR) for handle in handles] == positions

    with ThreadPoolExecutor(1) as pool:
        pool.submit(read_all).result()
    process = forking().Process(target=read_all)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_workers_and_threads_see_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "X.zip")
    for ours, theirs in zip(
        *(load_images("folder", str(root), 32, 0, False, 1, ALONE) for root in (packed, folder)),
        strict=True,
    ):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.fingerprint == theirs.fingerprint
    batches = []
    for root in (packed, folder):
        crops = RandomCrops(find_split(root, "train", ALONE).files, 2, 24, (0.2, 1.0), seed=3)
        loader = CropLoader(crops, 50, Loading(2), ALONE)
        batches.append([both for _, both, _ in loader.epoch(1, 0, 4)])
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))


def test_no_object_for_each_entry(folder: Path, tmp_path: Path) -> None:
    """What a loader process gets: the directory's bytes, and eight for each image."""
    packed = pack(folder, tmp_path / "X.zip")
    with zipfile.ZipFile(packed) as archive:
        directory = packed.stat().st_size - archive.start_dir
    files = find_split(packed, "train", ALONE).files
    assert len(pickle.dumps(files)) < directory + 8 * 200 + 500


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    put(tmp_path, "old/a.png", "new/a.png")
    for name in ("old", "new"):
        pack(tmp_path / name, tmp_path / "Y.zip").replace(tmp_path / "X.zip")
        (file,) = find_split(tmp_path / "X.zip", "train", ALONE).files
        assert file.read().tobytes() == (tmp_path / name / "a.png").read_bytes()


def test_a_file_that_is_no_archive_or_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, "a.tar")
    with pytest.raises(UserError, match=r"a\.tar is not a complete zip archive \(its end is miss"):
        find_split(tmp_path / "a.tar", "train", ALONE)
    with pytest.raises(UserError, match=r"absent\.zip: no such folder"):
        find_split(tmp_path / "absent.zip", "train", ALONE)
