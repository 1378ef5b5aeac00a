"""common/data/photographs.py: what the loader's workers decode and cut."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from common.augment.crop import draw_crops
from common.augment.randaugment import RandAugment
from common.data import decoding, photographs
from common.data.decoding import decode, square, without_ends
from common.data.loader import CropLoader, Loading
from common.data.photographs import (
    CentreCrops,
    RandomCrops,
    crop,
    find_photographs,
    stack,
)
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from common.runtime.seeding import epoch_order, generator_for
from pillow_reference import pictures, to_pillow

ALONE = Ranks(0, 1, torch.device("cpu"))
SCALE = (0.2, 1.0)
SIZE = 24


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Eleven JPEGs of two sizes in two classes."""
    paths = []
    for index in range(11):
        image = to_pillow(pictures(11, (60, 80) if index % 2 else (50, 45)))[index]
        path = tmp_path / "train" / "ab"[index % 2] / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95)
        paths.append(path)
    return sorted(paths)


def two_crops(images: list, **options) -> RandomCrops:
    return RandomCrops(images, 2, SIZE, SCALE, seed=3, **options)


def batches(
    crops: RandomCrops, workers: int = 0, ranks: Ranks = ALONE, first_step: int = 0, epoch: int = 1
) -> list[tuple[int, Tensor, Tensor]]:
    loader = CropLoader(crops, 4, Loading(workers), ranks)
    steps = loader.epoch(epoch, first_step, len(crops) // 4)
    return [(step, first, second) for step, (first, second), _ in steps]


def by_pillow(path: Path, epoch: int, index: int, view: int) -> numpy.ndarray:
    image = Image.open(path).convert("RGB")
    generator = generator_for("crop", 3, epoch, index)
    boxes = draw_crops(2, (image.height, image.width), SCALE, generator).int().tolist()
    top, left, height, width = boxes[view]
    image = image.crop((left, top, left + width, top + height))
    return numpy.array(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)


def test_both_crops_are_those_that_pillow_cuts(files: list[Path]) -> None:
    crops = two_crops(files)
    for index, path in enumerate(files):
        item = [crop.permute(1, 2, 0).numpy().astype(int) for crop in crops[5, index][0]]
        for view in range(2):
            assert numpy.abs(item[view] - by_pillow(path, 5, index, view)).max() <= 1
        assert not numpy.array_equal(item[0], item[1])


def test_a_crop_of_the_whole_at_its_own_size_is_the_photograph(files: list[Path]) -> None:
    part = decode(files[0])[:, :40, :40]
    assert torch.equal(crop(part, (0, 0, 40, 40), 40), part)


def test_the_whole_photograph_is_augmented_before_each_crop(files: list[Path]) -> None:
    whole = RandAugment(2, 9)
    item = two_crops(files, whole=whole)[2, 4][0]
    generator = generator_for("crop", 3, 2, 4)
    photograph = decode(files[4])
    boxes = draw_crops(2, (photograph.shape[1], photograph.shape[2]), SCALE, generator).tolist()
    for view in range(2):
        shown = whole(photograph[None], generator)[0]
        assert torch.equal(item[view], crop(shown, boxes[view], SIZE))
    assert not torch.equal(item[0], item[1])


def test_batches_follow_the_epochs_order(files: list[Path]) -> None:
    crops = two_crops(files)
    order = epoch_order(11, 3, 1).tolist()
    found = batches(crops)
    assert [step for step, _, _ in found] == [0, 1]  # the last three photographs are left out
    for step, first, second in found:
        expected = [crops[1, index][0] for index in order[4 * step : 4 * step + 4]]
        assert torch.equal(first, torch.stack([item[0] for item in expected]))
        assert torch.equal(second, torch.stack([item[1] for item in expected]))


def test_workers_ranks_and_a_later_start_change_nothing(files: list[Path]) -> None:
    crops = two_crops(files)
    expected = batches(crops)
    for found in (batches(crops, workers=2), batches(crops, first_step=1)):
        for (step, *ours), (_, *theirs) in zip(
            found, expected[len(expected) - len(found) :], strict=True
        ):
            assert all(map(torch.equal, ours, theirs)), step
    halves = [batches(crops, ranks=Ranks(rank, 2, ALONE.device)) for rank in range(2)]
    for (_, *left), (_, *right), (_, *whole) in zip(*halves, expected, strict=True):
        for view in range(2):
            assert torch.equal(torch.cat([left[view], right[view]]), whole[view])
    other = batches(crops, epoch=2)
    assert not torch.equal(other[0][1], expected[0][1])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("skip_broken", [False, True])
def test_the_next_file_takes_the_place_of_a_broken_one(
    skip_broken: bool, workers: int, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The step can then be finished on every rank; without --skip-broken the run has to stop."""
    files[2].write_bytes(files[2].read_bytes()[:100])
    crops = two_crops(files)
    item = crops[0, 2]
    assert item.index == 3
    image = by_pillow(files[3], 0, 2, 0)  # the next file, by the draws of the broken one
    assert numpy.abs(item.crops[0].permute(1, 2, 0).numpy().astype(int) - image).max() <= 1

    loader = CropLoader(crops, 11, Loading(workers, skip_broken=skip_broken), ALONE)
    (((first, _), indices),) = [loaded for _, *loaded in loader.epoch(0, 0, 1)]
    place = epoch_order(11, 3, 0).tolist().index(2)
    assert indices[place] == 3
    assert torch.equal(first[place], item.crops[0])
    said = capsys.readouterr()
    name = re.escape(str(files[2]))
    assert loader.must_stop is not skip_broken
    if skip_broken:
        assert re.search(rf"replaced by the next ones: 1 \({name} cannot be decoded", said.out)
        assert not said.err
    else:
        assert re.match(rf"error: {name} cannot be decoded .* with --skip-broken$", said.err)
        assert not said.out


def test_nothing_readable_is_told(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in files[1:]:
        path.write_bytes(b"no picture")
    monkeypatch.setattr(photographs, "GIVE_UP_AFTER", 3)
    crops = two_crops(files)
    assert crops[0, 9].index == 0  # the second after it, by way of the last
    problem = stack([crops[0, 0], crops[0, 4]]).error
    assert re.match(rf"3 photographs in a row .*{files[4].name} cannot", problem)
    with pytest.raises(UserError, match="in a row cannot be decoded"):
        batches(crops)


@pytest.mark.parametrize("at_once", [4, 3])
@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_disk_that_goes_away_stops_the_run_after_the_step(
    skip_broken: bool,
    at_once: int,
    files: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The batch before lets all ranks finish the step, which then has its checkpoint."""
    loading = Loading(0, skip_broken=skip_broken)
    loader = CropLoader(two_crops(files), 4, loading, ALONE, at_once)
    steps = loader.epoch(1, 0, 2)
    _, before, _ = next(steps)
    assert not loader.must_stop
    (tmp_path / "train").rename(tmp_path / "gone")
    step, crops, indices = next(steps)
    assert (step, len(indices)) == ((1, 4) if at_once == 4 else (0, 1))  # a step in pieces of 3, 1
    assert torch.equal(crops, before[:, : len(indices)])
    assert loader.must_stop
    assert re.search(
        r"error: 11 photographs in a row .*the same command continues", capsys.readouterr().err
    )
    with pytest.raises(UserError, match="in a row cannot be decoded"):
        next(loader.epoch(2, 0, 2))


def test_of_a_very_long_image_only_the_centre_is_resized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = pictures(1, (2, 1000))[0]
    views = CentreCrops([image, image[:, :, 436:564], image.transpose(1, 2)], SIZE)
    whole, centre, upright = (views[index].crops[0] for index in range(3))
    assert torch.equal(whole, centre)
    assert (upright.transpose(1, 2).int() - whole).abs().max() <= 1
    assert torch.equal(square(image, SIZE), square(image[:, :, 436:564], SIZE))
    assert torch.equal(without_ends(image), image[:, :, 436:564])
    assert torch.equal(without_ends(image[:, :, 1:]), image[:, :, 436:565])  # 999 = 435 + 129 + 435
    shapes = []
    for part, view in ((photographs, views.view), (decoding, lambda image: square(image, SIZE))):
        with monkeypatch.context() as patch:
            patch.setattr(part, "without_ends", lambda x: shapes.append(x.shape) or without_ends(x))
            view(image)
    assert shapes == [image.shape] * 2


def test_folders_with_and_without_labels(files: list[Path], tmp_path: Path) -> None:
    found = find_photographs("folder", str(tmp_path), SIZE, 0, 4, "train", ALONE)
    assert list(found.photographs) == files
    assert list(found.labels) == [0] * 6 + [1] * 5
    assert found.class_names == ("a", "b")
    flat = find_photographs("folder", str(tmp_path / "train" / "a"), SIZE, 0, 4, "train", ALONE)
    assert (len(flat.photographs), list(flat.labels), flat.class_names) == (6, [], ())


def test_what_is_missing_is_told(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_photographs("folder", str(tmp_path / "nowhere"), SIZE, 0, 4, "train", ALONE)
    with pytest.raises(UserError, match="has no val/ folder"):
        find_photographs("folder", str(tmp_path), SIZE, 0, 4, "val", ALONE)
    with pytest.raises(UserError, match="a batch of 12 does not fit a set of 11 images"):
        find_photographs("folder", str(tmp_path), SIZE, 0, 12, "train", ALONE)
    with pytest.raises(UserError, match="a batch of 6001 does not fit a set of 6000 images"):
        find_photographs("shapes", "", SIZE, 0, 6001, "train", ALONE)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="no images in"):
        find_photographs("folder", str(tmp_path), SIZE, 0, 4, "val", ALONE)


def test_shapes_need_no_files() -> None:
    train = find_photographs("shapes", "", 16, 0, 4, "train", ALONE)
    test = find_photographs("shapes", "", 16, 0, 4, "val", ALONE)
    assert len(train.photographs) == len(train.labels) > len(test.photographs) > 0
    assert train.photographs[0].shape == (3, 16, 16)
    assert not torch.equal(train.photographs[0], test.photographs[0])


def test_evaluation_views_are_torchvisions(files: list[Path]) -> None:
    views = CentreCrops(files, 28)  # the shorter side becomes 32
    reference = transforms.Compose(
        [transforms.Resize(32, antialias=True), transforms.CenterCrop(28)]
    )
    for index, path in enumerate(files):
        view, found, _ = views[index]
        expected = numpy.array(reference(Image.open(path).convert("RGB"))).astype(int)
        assert found == index
        assert numpy.abs(view[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_last_smaller_batch_is_shared_too(files: list[Path]) -> None:
    crops = two_crops(files)
    order = epoch_order(11, 3, 0).tolist()
    found = []
    for rank in range(2):
        loader = CropLoader(crops, 4, Loading(0), Ranks(rank, 2, ALONE.device))
        found.append([indices.tolist() for _, _, indices in loader.epoch(0, 0, 3)])
    assert found[0] == [order[0:2], order[4:6], order[8:9]]
    assert found[1] == [order[2:4], order[6:8], order[9:10]]
