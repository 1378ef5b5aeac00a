"""common/data/listing.py: which files are images, which are left out, which layouts refused."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import torch

from common.data.decoding import decode
from common.data.fingerprint import fingerprint
from common.data.folder import Files, Folder, list_images
from common.data.listing import find_split, label_by_folder, read_classes, renumber
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from pillow_reference import pictures, to_pillow

ALONE = Ranks(0, 1, torch.device("cpu"))


def walk(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    found = Folder(folder).find()
    return found.names, found.left_out


def put(folder: Path, *names: str) -> None:
    (image,) = to_pillow(pictures(1, (8, 8)))
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")


def test_hidden_and_other_files_are_not_listed(tmp_path: Path) -> None:
    put(
        tmp_path, "b.png", "a/c.JPG", "a/d.pgm", ".hidden.png", ".thumbs/b.png", "a/.x/deeper/c.png"
    )
    (tmp_path / "a" / "list.csv").write_text("c,1")
    (tmp_path / "photo.heic").write_text("of a kind that cannot be decoded")
    (tmp_path / ".lock").write_text("")
    assert walk(tmp_path) == (
        ["a/c.JPG", "a/d.pgm", "b.png"],
        {
            "hidden files and folders": [".hidden.png", ".thumbs", "a/.x"],
            "files of other kinds": ["a/list.csv", "photo.heic"],
        },
    )


def test_a_hidden_root_is_no_hindrance(tmp_path: Path) -> None:
    put(tmp_path / ".cache" / "set", "a.png")
    assert list_images(tmp_path / ".cache" / "set") == [tmp_path / ".cache" / "set" / "a.png"]


def test_names_are_sorted_folder_by_folder(tmp_path: Path) -> None:
    """As paths are: "a/x" before "a-b/x", although "-" comes before "/"."""
    put(tmp_path, "a-b/x.png", "a/x.png", "a/b/0.png", "z.png", "B/0.png", "folder.png/0.png")
    (tmp_path / "empty.png").mkdir()
    expected = ["B/0.png", "a/b/0.png", "a/x.png", "a-b/x.png", "folder.png/0.png", "z.png"]
    assert walk(tmp_path) == (expected, {})
    assert list_images(tmp_path) == sorted(p for p in tmp_path.rglob("*.png") if p.is_file())


def test_only_regular_files_are_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a FIFO would wait for ever."""
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "a.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # its address may not be long
        server.bind("socket.png")
    assert walk(tmp_path) == (
        ["a.png", "linked.png"],
        {
            "not regular files, or broken links": [
                *("device.png", "fifo.jpg", "gone.png", "itself.png", "socket.png"),
            ]
        },
    )
    assert find_split(tmp_path, "train", ALONE).names == ["a.png", "linked.png"]
    with pytest.raises(UserError, match=r"itself\.png cannot be read \(Too many levels of"):
        find_split(tmp_path / "itself.png", "train", ALONE)


def test_a_link_to_a_folder_above_is_left_out_and_told(tmp_path: Path) -> None:
    """A folder that is linked twice counts twice, whichever is read first."""
    put(tmp_path, "cats/0.png", "cats/deep/1.png")
    (tmp_path / "cats" / "deep" / "up").symlink_to(tmp_path / "cats")
    (tmp_path / "again").symlink_to(tmp_path / "cats")
    images = [
        f"{parent}/{name}" for parent in ("again", "cats") for name in ("0.png", "deep/1.png")
    ]
    links = [f"{parent}/deep/up" for parent in ("again", "cats")]
    assert walk(tmp_path) == (images, {"links to a folder that contains them": links})


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/0.png", "b/0.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if path == str(tmp_path / "a"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert walk(tmp_path) == (
        ["b/0.png"],
        {"folders that cannot be read: Permission denied": ["a"]},
    )


def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff/\xfe.png")
    put(tmp_path / "train", name)
    (tmp_path / "train" / os.fsdecode(b"\xfd.txt")).write_text("")
    listing = find_split(tmp_path, "train", ALONE)
    assert listing.names == [name]
    assert decode(listing.files[0]).shape == (3, 8, 8)
    assert r"Not used: 1 files of other kinds (\xfd.txt)." in capsys.readouterr().out


def test_paths_come_back_from_one_block_of_memory(tmp_path: Path) -> None:
    names = ["a/é.png", os.fsdecode(b"\xff.png"), "b.png"]
    files = Files(tmp_path, names)
    assert [files[index] for index in range(len(files))] == [tmp_path / name for name in names]
    assert files.names.dtype.kind == "S"


def test_what_was_found_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "train/cat/0.png", "train/dog/0.png", "train/dog/1.png", "val/0.png")
    for index in range(5):
        (tmp_path / "train" / f"{index}.txt").write_text("")
    find_split(tmp_path, "train", ALONE)
    find_split(tmp_path, "train", Ranks(1, 2, ALONE.device))
    listing = find_split(tmp_path, "val", ALONE)
    assert (listing.labels, listing.class_names, listing.stray) == ([], (), "0.png")
    assert capsys.readouterr().out.splitlines() == [
        f"Found 3 images of 2 classes in {tmp_path / 'train'}.",
        "  Not used: 5 files of other kinds (0.txt, 1.txt, 2.txt, …).",
        f"Found 1 images without classes in {tmp_path / 'val'}.",
    ]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["Train/cat/0.png", "val/cat/0.png"], "{root} holds Train/; rename it to train/"),
        (["TRAIN/0.png"], "{root} holds TRAIN/; rename it to train/"),
        (["val/cat/0.png", "training/cat/0.png"], "{root} holds val/ but no train/, so that the"),
        (["Validation/cat/0.png"], "{root} holds Validation/ but no train/"),
        (
            ["x/train/cat/0.png", "x/val/cat/0.png"],
            "holds the splits in x/; give --data-root {root}/x",
        ),
        (["x/y/Train/a.png", "x/y/test/0.png", "x/0.png"], "give --data-root {root}/x/y"),
    ],
)
def test_a_layout_whose_validation_images_would_be_trained_on_is_refused(
    names: list[str], sentence: str, tmp_path: Path
) -> None:
    put(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        find_split(tmp_path, "train", ALONE)
    assert sentence.format(root=tmp_path) in str(caught.value)


def test_an_evaluation_folder_in_other_capitals_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train/cat/0.png", "Val/cat/0.png")
    with pytest.raises(UserError, match=r"holds Val/; rename it to val/$"):
        find_split(tmp_path, "val", ALONE)


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    put(tmp_path, "vehicles/train/0.png", "vehicles/car/0.png")
    assert len(find_split(tmp_path, "train", ALONE).names) == 2


def test_a_folder_without_images_says_what_it_holds_instead(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("")
    with pytest.raises(UserError, match=r"no images in .*, but 1 files of .* \(a\.heic\)$"):
        find_split(tmp_path, "train", ALONE)


def test_labels_are_numbers_of_the_first_folder() -> None:
    names = ["b/0.png", "a/x/0.png", "b/1.png"]
    assert label_by_folder(names) == ([1, 0, 1], ("a", "b"), "")
    assert label_by_folder([*names, "stray.png"]) == ([], (), "stray.png")


def test_evaluation_labels_get_the_training_sets_numbers() -> None:
    assert renumber([1, 0, 1], ("ant", "cat"), ("ant", "bee", "cat"), "val/") == [2, 0, 2]
    with pytest.raises(UserError, match=r"^val/ has 2 classes that .* do not have: dog, emu$"):
        renumber([0, 1], ("dog", "emu"), ("ant",), "val/")


# --classes ---------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_classes_of_a_file(tmp_path: Path) -> None:
    """As editors of Windows write it too; names with spaces, "#" and bytes that are not UTF-8."""
    content = b"\xef\xbb\xbf# from a paper\r\n\r\nsea lion\r\nC#\t# a language\r\n  dog  \n\xff"
    path = Path(write(tmp_path / "list.txt", content))
    assert read_classes(path) == {"sea lion", "C#", "dog", os.fsdecode(b"\xff")}


def test_imagenet_100_has_a_hundred_classes_of_imagenet() -> None:
    path = Path(__file__).parents[2] / "common" / "data" / "imagenet100.txt"
    classes = read_classes(path)
    assert len(classes) == 100
    assert all(re.fullmatch(r"n\d{8}", name) for name in classes)


def test_only_the_listed_classes_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "set", *(f"train/{name}/0.png" for name in ("ant", "bee", "cat", "dog")))
    put(tmp_path / "set", "train/cat/deep/1.png", "train/dog/deep/cat/0.png", "val/cat/0.png")
    put(tmp_path / "set", "val/bee/0.png", "val/ant/0.png")
    classes = write(tmp_path / "list.txt", b"cat\nbee\n")
    train = find_split(tmp_path / "set", "train", ALONE, 1, classes)
    assert train.names == ["bee/0.png", "cat/0.png", "cat/deep/1.png"]
    assert (train.labels, train.class_names) == ([0, 1, 1], ("bee", "cat"))
    assert find_split(tmp_path / "set", "val", ALONE, 1, classes).labels == [0, 1]
    not_used = "  Not used: {} classes that --classes does not list ({})."
    assert capsys.readouterr().out.splitlines() == [
        f"Found 3 images of 2 classes in {tmp_path / 'set' / 'train'}.",
        not_used.format(2, "ant, dog"),
        f"Found 2 images of 2 classes in {tmp_path / 'set' / 'val'}.",
        not_used.format(1, "ant"),
    ]
    # A folder of these classes alone is the same set, and so is a list elsewhere.
    put(tmp_path / "alone", *(f"train/{name}" for name in train.names))
    alone = find_split(tmp_path / "alone", "train", ALONE)
    moved = write(tmp_path / "moved.txt", b"bee\n# in another order\ncat")
    again = find_split(tmp_path / "set", "train", ALONE, 1, moved)
    assert fingerprint(alone.names) == fingerprint(again.names) == fingerprint(train.names)


@pytest.mark.parametrize(
    ("content", "names", "sentence"),
    [
        (b"# only this\n \n", ["train/cat/0.png"], r"list\.txt names no class; write one a line$"),
        (b"cat\ndog\n cat", ["train/cat/0.png"], r"list\.txt names a class twice: cat$"),
        (
            b"cat\ngnu\nyak",
            ["train/cat/0.png", "train/gnu/x.txt"],
            r"train has no images of 2 of the classes in .*list\.txt: gnu, yak$",
        ),
        (
            b"cat",
            ["train/0.png", "train/cat/0.png"],
            r"list\.txt needs images in class folders, and .*train has 0\.png$",
        ),
        (b"cat", ["0.png"], r"needs images in class folders, and .* has 0\.png$"),
        (None, ["train/cat/0.png"], r"list\.txt cannot be read \(No such file or directory\)$"),
    ],
)
def test_classes_that_do_not_fit_are_told(
    content: bytes | None, names: list[str], sentence: str, tmp_path: Path
) -> None:
    put(tmp_path / "set", *names)
    if content is not None:
        write(tmp_path / "list.txt", content)
    with pytest.raises(UserError, match=sentence):
        find_split(tmp_path / "set", "train", ALONE, 1, str(tmp_path / "list.txt"))
