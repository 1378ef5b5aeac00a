"""common/data/in_memory.py on files made here, and common/data/shapes.py."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from assertions import assert_equal
from common.data import shapes as generated
from common.data.fingerprint import fingerprint
from common.data.folder import list_images
from common.data.in_memory import Split, load_cifar, load_folder, load_images
from common.data.shapes import CLASS_NAMES, shapes
from common.evaluation.knn import knn_predict
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from pillow_reference import pictures, to_pillow
from published_files import forbid_downloads, put_cifar

torch.set_num_threads(1)

ONE_PROCESS = Ranks(0, 1, torch.device("cpu"))
UNLABELLED = "No labelled evaluation"


def put(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def put_broken(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not an image")
    return path


def put_pictures(folder: Path, names: list[str], seed: int = 0) -> Tensor:
    """32-pixel PNGs, which keep every pixel; uint8 [N, 3, 32, 32] in the order of the names."""
    images = pictures(len(names), (32, 32), seed)
    for name, image in zip(names, to_pillow(images), strict=True):
        put(folder / name, image)
    return images


def load(root: Path, skip_broken: bool = False, at_least: int = 1) -> Split:
    return load_folder(str(root), 32, skip_broken, at_least, ONE_PROCESS)


# A labelled folder -------------------------------------------------------------------------------


def test_labelled_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are sorted, files in them too, deeper folders and capital suffixes count."""
    train_names = ["cat/1.png", "cat/deeper/0.png", "dog/a.PNG", "dog/b.png", "emu/x.png"]
    test_names = ["dog/1.png", "emu/1.png", "emu/2.png"]  # no cat
    train_images = put_pictures(tmp_path / "train", train_names)
    test_images = put_pictures(tmp_path / "val", test_names, seed=1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    put_broken(tmp_path / "train" / "cat" / ".hidden.png")
    train, test = load(tmp_path)
    assert_equal(train.images, train_images, "train")
    assert train.labels.tolist() == [0, 0, 1, 1, 2]
    assert test is not None
    assert_equal(test.images, test_images, "val")
    assert test.labels.tolist() == [1, 2, 2]
    for image_set in (train, test):
        assert image_set.labels.dtype == torch.int64
        assert image_set.class_names == ("cat", "dog", "emu")
    assert UNLABELLED not in capsys.readouterr().out


def test_class_in_val_that_train_has_not(tmp_path: Path) -> None:
    put_pictures(tmp_path / "train", ["cat/0.png", "dog/0.png"])
    put_pictures(tmp_path / "val", ["cat/0.png", "yak/0.png", "gnu/0.png"])
    with pytest.raises(UserError, match=r"val has 2 classes that the .* do not have: gnu, yak$"):
        load(tmp_path)


@pytest.mark.parametrize("val", ["missing", "without classes"])
def test_train_classes_without_val_are_kept(
    val: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_images = put_pictures(tmp_path / "train", ["cat/0.png", "dog/0.png", "dog/1.png"])
    reason = f"{tmp_path} has no val/<class>/ folders"
    if val == "without classes":
        reason = f"0.png is in no class folder of {tmp_path / 'val'}"
        put_pictures(tmp_path / "val", ["0.png"])
    train, test = load(tmp_path)
    assert_equal(train.images, train_images, "train")
    assert train.labels.tolist() == [0, 1, 1]
    assert train.class_names == ("cat", "dog")
    assert test is None
    said = capsys.readouterr().out
    assert said.count(UNLABELLED) == 1
    assert f"{UNLABELLED} (kNN, linear): {reason}." in said


# Images without labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        pytest.param(["0.png", "1.png", "2.png"], [], id="flat"),
        pytest.param(["a/0.png", "a/b/1.png", "c/2.png", "z.png"], [], id="nested"),
        pytest.param(["cat/0.png", "dog/0.png"], [], id="classes without train"),
        pytest.param(["train/0.png", "train/1.png"], ["val/0.png"], id="train without classes"),
        pytest.param(["train/0.png", "train/cat/1.png"], ["2.png"], id="train partly in classes"),
    ],
)
def test_images_without_labels(
    names: list[str], left_out: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = put_pictures(tmp_path, names)
    for name in left_out:
        put(tmp_path / name, Image.new("RGB", (32, 32)))
    train, test = load(tmp_path)
    assert_equal(train.images, images, "the images, in the order of their paths")
    assert (train.labels, train.class_names, test) == (None, (), None)
    said = capsys.readouterr().out
    assert said.count(UNLABELLED) == 1
    reason = f"there is no train/ folder in {tmp_path}"
    if left_out:
        reason = f"0.png is in no class folder of {tmp_path / 'train'}"
    assert f"{UNLABELLED} (kNN, linear): {reason}." in said


def test_only_the_first_rank_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(1, 2, torch.device("cpu"))  # there is no other rank
    monkeypatch.setattr(Ranks, "join", lambda _, columns: columns)
    images = put_pictures(tmp_path, ["0.png", "1.png"])
    put_broken(tmp_path / "2.png")
    train, _ = load_folder(str(tmp_path), 32, True, 1, ranks)
    assert_equal(train.images, images, "the second rank's")
    assert capsys.readouterr() == ("", "")


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    """A set is often assembled from links to another disk: of the root, of classes, of files."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    images = put_pictures(elsewhere, ["cats/0.png", "cats/deeper/1.png", "x.png"])
    (elsewhere / "train" / "dog").mkdir(parents=True)
    (elsewhere / "train" / "cat").symlink_to(elsewhere / "cats")
    (elsewhere / "train" / "dog" / "2.png").symlink_to(elsewhere / "x.png")
    root.symlink_to(elsewhere)
    names = ["cat/0.png", "cat/deeper/1.png", "dog/2.png"]
    assert list_images(root / "train") == [root / "train" / name for name in names]
    train, _ = load(root)
    assert_equal(train.images, images, "by way of links")
    assert train.labels.tolist() == [0, 0, 1]


# Broken files ------------------------------------------------------------------------------------


def break_file(path: Path, how: str) -> None:
    if how == "no image":
        put_broken(path)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        put(path, to_pillow(pictures(1, (64, 64)))[0])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("cat/1.png", "no image"),
        ("cat/1.png", "empty"),
        ("cat/1.png", "truncated"),
        ("cat/1.jpg", "truncated"),
        ("cat/1.gif", "truncated"),
        ("cat/1.webp", "truncated"),
        ("cat/1.bmp", "truncated"),
        ("cat/1.tif", "truncated"),
        ("cat/1.ppm", "truncated"),
    ],
)
def test_broken_files_are_named_or_left_out(
    name: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels stay with their images: the broken file is between the others."""
    train_images = put_pictures(tmp_path / "train", ["cat/0.png", "cat/2.png", "dog/0.png"])
    test_images = put_pictures(tmp_path / "val", ["cat/0.png", "dog/0.png"], seed=1)
    broken = tmp_path / "train" / name
    break_file(broken, how)
    with pytest.raises(UserError, match=f"^{re.escape(str(broken))} cannot be decoded.*--skip-bro"):
        load(tmp_path)
    break_file(tmp_path / "val" / name, how)
    capsys.readouterr()
    train, test = load(tmp_path, skip_broken=True)
    assert test is not None
    assert_equal(train.images, train_images, "train")
    assert train.labels.tolist() == [0, 0, 1]
    assert_equal(test.images, test_images, "val")
    assert test.labels.tolist() == [0, 1]
    said = capsys.readouterr().out
    for split in ("train", "val"):
        assert f"Left out 1 broken files of {tmp_path / split}: {name}\n" in said
    names = ["cat/0.png", "cat/2.png", "dog/0.png"]
    assert train.fingerprint == fingerprint(names, [tmp_path / "train" / name for name in names])


def test_a_broken_file_in_val_is_named(tmp_path: Path) -> None:
    put_pictures(tmp_path / "train", ["cat/0.png"])
    broken = put_broken(tmp_path / "val" / "cat" / "0.png")
    with pytest.raises(UserError, match=f"^{re.escape(str(broken))} cannot be decoded"):
        load(tmp_path)


def test_many_broken_files_are_counted_and_some_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = put_pictures(tmp_path, ["a.png", "z.png"])
    for index in range(7):
        put_broken(tmp_path / f"m{index}.png")
    assert_equal(load(tmp_path, skip_broken=True).train.images, images, "what is left")
    said = capsys.readouterr().out
    assert f"Left out 7 broken files of {tmp_path}: m0.png, m1.png, m2.png, …\n" in said


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    for index in range(3):
        put_broken(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match="none of the 3 images"):
        load(tmp_path, skip_broken=True)


# Too little --------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'absent'))}: no such folder"):
        load(tmp_path / "absent")


@pytest.mark.parametrize("layout", [".", "train", "train/cat"])
def test_empty_folder(layout: str, tmp_path: Path) -> None:
    (tmp_path / layout).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: no images in"):
        load(tmp_path)


def test_batch_larger_than_the_set_is_refused_before_decoding(tmp_path: Path) -> None:
    for index in range(3):
        put_broken(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match=r"batch of 4 .* 3 images .*--batch-size 3 or less"):
        load(tmp_path, at_least=4)


def test_batch_larger_than_what_can_be_decoded(tmp_path: Path) -> None:
    put_pictures(tmp_path, ["0.png", "1.png"])
    put_broken(tmp_path / "2.png")
    with pytest.raises(UserError, match=r"batch of 3 .* 2 images .*--batch-size 2 or less"):
        load_images("folder", str(tmp_path), 32, 0, True, 3, ONE_PROCESS)
    assert len(load_images("folder", str(tmp_path), 32, 0, True, 2, ONE_PROCESS).train) == 2


# CIFAR -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(
    dataset: str,
    classes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, labels = put_cifar(dataset, tmp_path, monkeypatch)
    forbid_downloads(monkeypatch, AssertionError("everything is there"))
    train, test = load_cifar(dataset, str(tmp_path), 32, ONE_PROCESS)
    assert capsys.readouterr().out == f"Found 20 images of {classes} classes in {tmp_path}.\n"
    assert test is not None
    assert_equal(train.images, images[:20], "train")
    assert_equal(test.images, images[20:], "test")
    assert (train.labels.tolist(), test.labels.tolist()) == (labels[:20], labels[20:])
    for image_set in (train, test):
        assert image_set.images.is_contiguous()
        assert image_set.labels.dtype == torch.int64
        assert image_set.class_names == tuple(f"class {index}" for index in range(classes))
    with pytest.raises(UserError, match=rf"batch of 21 .* 20 images \({dataset}\)"):
        load_images(dataset, str(tmp_path), 32, 0, False, 21, ONE_PROCESS)


@pytest.mark.parametrize(("dataset", "name"), [("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")])
def test_cifar_of_another_size_is_refused_at_once(
    dataset: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_downloads(monkeypatch, AssertionError("nothing has to be downloaded"))
    with pytest.raises(UserError, match=f"{name} has 32-px images, not 64"):
        load_cifar(dataset, str(tmp_path), 64, ONE_PROCESS)


# Shapes ------------------------------------------------------------------------------------------


def as_bytes(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def load_shapes(image_size: int, seed: int, at_least: int = 1) -> Split:
    return load_images("shapes", "unused", image_size, seed, False, at_least, ONE_PROCESS)


def test_shapes_as_a_data_set() -> None:
    train, test = load_shapes(8, 0, at_least=6000)
    assert test is not None
    for image_set, count in ((train, 6000), (test, 1000)):
        assert image_set.images.shape == (count, 3, 8, 8)
        assert torch.bincount(image_set.labels).tolist() == [count // 10] * 10
        assert image_set.class_names == CLASS_NAMES
    with pytest.raises(UserError, match=r"batch of 6001 .* 6000 images \(shapes\)"):
        load_shapes(8, 0, at_least=6001)


def test_shapes_of_different_seeds_share_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "SPLITS", {"train": 60, "val": 20})
    seen: set[bytes] = set()
    for seed in range(4):
        train, test = load_shapes(32, seed)
        again, test_again = load_shapes(32, seed)
        assert test is not None
        assert test_again is not None
        assert_equal(again.images, train.images, "train, once more")
        assert_equal(test_again.images, test.images, "test, once more")
        seen |= as_bytes(train.images) | as_bytes(test.images)
    assert len(seen) == 4 * (60 + 20)


@pytest.mark.parametrize("size", [32, 64])
def test_shapes(size: int) -> None:
    global_state = torch.get_rng_state()
    images, labels = shapes(40, size, seed=3)
    assert images.dtype == torch.uint8
    assert images.shape == (40, 3, size, size)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [*range(10)] * 4
    assert torch.equal(torch.get_rng_state(), global_state)
    assert_equal(shapes(40, size, seed=3)[0], images, "once more")
    assert_equal(shapes(13, size, seed=3)[0], images[:13], "a smaller count")
    assert not as_bytes(shapes(40, size, seed=4)[0]) & as_bytes(images)
    # Every picture has dark and bright parts, and colours.
    assert bool((images.amax((1, 2, 3)) - images.amin((1, 2, 3)) >= 100).all())
    assert bool((images.amax(1) - images.amin(1) >= 40).flatten(1).any(1).all())


def test_shapes_at_another_size_are_the_same_pictures() -> None:
    """Blocks of 2 × 2 pixels, averaged, are the smaller picture but for the glyphs' edges."""
    small, large = shapes(40, 32, seed=3)[0].float(), shapes(40, 64, seed=3)[0].float()
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert float((halved - small).abs().mean()) <= 4
    assert float((halved - small.roll(1, 0)).abs().mean()) >= 30


def test_shapes_cannot_be_told_by_their_pixels() -> None:
    """One in ten by chance; features have to be learned."""
    bank, bank_labels = shapes(2000, 32, seed=0)
    queries, labels = shapes(500, 32, seed=1)
    predictions = knn_predict(queries.flatten(1), bank.flatten(1), bank_labels, len(CLASS_NAMES))
    assert float((predictions == labels).float().mean()) <= 0.25
