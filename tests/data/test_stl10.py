"""common/data/stl10.py on small files of STL-10's format, against torchvision's reader."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy
import pytest
import torch
from torchvision.datasets import STL10

from common.data.photographs import PhotographSet, RandomCrops, find_photographs
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from published_files import STL10_NAMES, forbid_downloads, put_stl10

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """7 images with labels and 4 without to train on, 5 to test."""
    put_stl10(tmp_path, monkeypatch)
    forbid_downloads(monkeypatch, AssertionError("everything is there"))
    return tmp_path


def find(root: Path, split: str, at_least: int = 1) -> PhotographSet:
    return find_photographs("stl10", str(root), 96, 0, at_least, split, ALONE)


@pytest.mark.parametrize(
    ("split", "torchvisions", "count", "labels"),
    [
        ("pretraining", "train+unlabeled", 11, [0, 3, 6, 9, 2, 5, 8]),
        ("train", "train", 7, [0, 3, 6, 9, 2, 5, 8]),
        ("val", "test", 5, [0, 3, 6, 9, 2]),
    ],
)
def test_every_image_and_label_is_torchvisions(
    split: str,
    torchvisions: str,
    count: int,
    labels: list[int],
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = find(root, split)
    expected = STL10(str(root), torchvisions)
    assert len(found.photographs) == len(expected) == count
    for photograph, (image, _) in zip(found.photographs, expected, strict=True):
        assert numpy.array_equal(photograph.permute(1, 2, 0).numpy(), numpy.asarray(image))
        assert photograph.permute(1, 2, 0).is_contiguous()  # the layout that resizing is fast with
    # torchvision counts the images without labels as class −1.
    assert labels + [-1] * (count - len(labels)) == expected.labels.tolist()
    assert found.labels == labels
    assert found.class_names == STL10_NAMES == tuple(expected.classes)
    assert not found.stray
    kind = " of 10 classes" if split != "pretraining" else ", 7 of them of 10 classes"
    assert capsys.readouterr().out == f"Found {count} images{kind} in {root}/stl10_binary.\n"


def test_images_are_a_sequence_without_a_copy_of_the_files(root: Path) -> None:
    images = find(root, "pretraining").photographs
    assert torch.equal(images[-1], images[10])
    with pytest.raises(IndexError):
        images[11]
    sent = pickle.dumps(images)  # as it is for a loader process where processes cannot fork
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[8], images[8])


def test_the_splits_are_told_apart_and_other_labels_are_another_set(root: Path) -> None:
    found = [find(root, split).fingerprint for split in ("pretraining", "train", "val")]
    assert len(set(found)) == 3
    assert found[0].startswith("11 images, checksum ")
    labels = root / STL10.base_folder / "train_y.bin"
    labels.write_bytes(labels.read_bytes()[::-1])
    assert find(root, "pretraining").fingerprint != found[0]


def test_what_does_not_fit_is_told(root: Path) -> None:
    for size in (97, 224):
        sentence = f"STL-10 has 96-px images, smaller than views of {size} px; use --image-size 96"
        with pytest.raises(UserError, match=f"^{sentence} or less$"):
            find_photographs("stl10", str(root / "absent"), size, 0, 1, "train", ALONE)
    with pytest.raises(UserError, match=r"a batch of 8 does not fit a set of 7 images \(stl10\)"):
        find(root, "train", at_least=8)
    find(root, "pretraining", at_least=11)


def test_a_file_that_another_machine_lacks_is_named(root: Path) -> None:
    find(root, "train")  # the first rank's are complete
    (root / STL10.base_folder / "unlabeled_X.bin").unlink()
    with pytest.raises(UserError, match=r"incomplete in .*unlabeled_X.bin.*every machine the same"):
        find(root, "pretraining")


def test_images_that_cannot_be_read_any_more_are_as_broken_files(root: Path) -> None:
    """The next image that can be read takes the place, as in a folder of photographs."""
    crops = RandomCrops(find(root, "pretraining").photographs, 2, 32, (0.2, 1.0), seed=3)
    file = root / STL10.base_folder / "unlabeled_X.bin"
    file.write_bytes(file.read_bytes()[: 3 * 96 * 96 + 5])
    assert crops[1, 7].index == 7
    item = crops[1, 8]
    assert item.index == 0
    assert item.broken == [
        f"{file} has no image {number}: it is shorter than before" for number in (1, 2, 3)
    ]
    file.unlink()
    assert [text.partition(" cannot be read (")[0] for text in crops[1, 10].broken] == [str(file)]
