"""kNN of a run on photographs: which are in the bank, whose labels they have, and its accuracy."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.data import workers
from common.data.in_memory import load_folder
from common.data.loader import Loading
from common.data.photographs import PhotographSet
from common.evaluation import photographs
from common.evaluation.feature_batches import centre_features
from common.evaluation.photographs import PhotographEvaluation, first_of_each_class
from common.evaluation.pretrained import require_same_weights
from common.runtime.errors import StopRequested, UserError
from common.runtime.ranks import Ranks
from processes import on_two_ranks


def test_the_first_of_each_class_in_order() -> None:
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 0, 0])
    assert first_of_each_class(labels, 2) == [0, 1, 2, 3, 4]
    assert first_of_each_class(labels, 1) == [0, 1, 3]
    assert first_of_each_class(labels, 9) == list(range(8))


class MeanColour(nn.Module):
    """A backbone whose features are the mean of each channel."""

    feature_dim = 3

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.mean(dim=(2, 3))


def of_colours(*colours: tuple[int, int, int]) -> list[Tensor]:
    return [torch.tensor(c, dtype=torch.uint8)[:, None, None].expand(3, 40, 40) for c in colours]


RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def test_knn_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third red photograph is labelled blue; a bank of two of each class leaves it out.

    The last photographs have no labels and are not in the bank either.
    """
    train = PhotographSet(
        of_colours(RED, GREEN, BLUE, RED, GREEN, BLUE, RED, RED, BLUE),
        [0, 1, 2, 0, 1, 2, 2],
        ("red", "green", "blue"),
        "train",
    )
    # Of other names in another order: the labels are renumbered.
    val = PhotographSet(of_colours(BLUE, RED, RED, GREEN), [0, 1, 1, 0], ("blue", "red"), "val")
    monkeypatch.setattr(photographs, "find_photographs", lambda *arguments: val)
    training = SimpleNamespace(
        ranks=Ranks(0, 1, torch.device("cpu")),
        config=SimpleNamespace(precision="fp32"),
        progress=SimpleNamespace(knn=None),
        stop=SimpleNamespace(requested=False),
        last_epoch=25,
    )
    config = SimpleNamespace(
        dataset="shapes",
        data_root="",
        classes="",
        image_size=32,
        workers=0,
        pin_memory=True,
        seed=0,
        knn_every=10,
        knn_images=2,
    )
    network = nn.Module()
    network.backbone = MeanColour()
    evaluation = PhotographEvaluation(training, network, train, config)
    due = {epoch: evaluation.after_epoch(epoch) for epoch in (1, 10, 11, 20, 25)}
    # Blue and both reds are right; green is called blue in val/ and green by its neighbours. All
    # six vote; the nearest two weigh most.
    assert due == {1: {}, 10: {"knn": 75.0}, 11: {}, 20: {"knn": 75.0}, 25: {"knn": 75.0}}
    assert training.progress.knn == 75.0
    assert network.backbone.training


RED_ALONE = PhotographSet(of_colours(RED), [0], ("red",), "train")
FOLDER = {"dataset": "folder", "data_root": "", "knn_every": 1, "image_size": 32, "workers": 0}
FOLDER |= {"classes": "", "seed": 0, "pin_memory": True}
TRAINING = SimpleNamespace(ranks=Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("change", [{"knn_every": 0}, {"data_root": "/nowhere"}])
def test_without_val_or_turned_off_there_is_no_knn(change: dict[str, object]) -> None:
    config = SimpleNamespace(**{**FOLDER, **change})
    assert PhotographEvaluation(TRAINING, None, RED_ALONE, config).after_epoch(1) == {}


def test_an_image_outside_the_class_folders_is_named_and_there_is_no_knn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ImageNet's validation archive unpacks: without class folders."""
    (tmp_path / "val" / "red").mkdir(parents=True)
    for name in ("0.png", "red/1.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name)
    config = SimpleNamespace(**{**FOLDER, "data_root": str(tmp_path)})
    unlabelled = RED_ALONE._replace(labels=[], class_names=(), stray="7.png")
    for train, sentence in ((RED_ALONE, "0.png of val/"), (unlabelled, "7.png of train/")):
        assert PhotographEvaluation(TRAINING, None, train, config).after_epoch(1) == {}
        said = capsys.readouterr().out.splitlines()
        assert said[-1] == f"No kNN: {sentence} is in no class folder."


def test_the_shared_memory_is_asked_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of the evaluation are larger than those of training may be."""
    images = PhotographSet(of_colours(*[RED] * 300), [0] * 300, ("red",), "train")
    free = 3 * (2 + 1) * 256 * 32 * 32  # two workers with a batch each, and one in use
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    config = SimpleNamespace(**{**FOLDER, "knn_every": 0, "workers": 2})
    for room in (free, free - 1):
        usage = SimpleNamespace(free=room)
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda path, usage=usage: usage)
        if room == free:
            PhotographEvaluation(TRAINING, None, images, config)
            continue
        with pytest.raises(UserError, match="use --workers 1"):
            PhotographEvaluation(TRAINING, None, images, config)


def where_rank_1_has_no_val(ranks: Ranks) -> list[str]:
    root = Path(os.environ["DIFFERENT_ROOTS"]) / str(ranks.rank)
    config = SimpleNamespace(**{**FOLDER, "data_root": str(root)})
    messages = []
    for start in (
        lambda: PhotographEvaluation(SimpleNamespace(ranks=ranks), None, RED_ALONE, config),
        lambda: load_folder(str(root), 32, False, 1, ranks),
    ):
        with pytest.raises(UserError) as refused:
            start()
        messages.append(str(refused.value))
    ranks.wait()  # both are here: none waits in another collective
    return messages


def test_a_val_that_only_one_machine_has_is_refused_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("0/train/red", "1/train/red", "0/val/red"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / folder / "image.png")
    monkeypatch.setenv("DIFFERENT_ROOTS", str(tmp_path))
    for rank, messages in enumerate(on_two_ranks(where_rank_1_has_no_val, tmp_path)):
        first, second = messages
        assert f"not every process finds val/ in {tmp_path / str(rank)}; give every mach" in first
        assert "not every process finds the same train/ and val/" in second


def features_where_rank_1_has_a_signal(ranks: Ranks) -> str:
    images = of_colours(*[RED] * 600)  # rank 0 and rank 1 have two batches each
    stop = SimpleNamespace(requested=ranks.rank == 1, exit_status=143)
    with pytest.raises(StopRequested) as stopped:
        centre_features(
            images, lambda crops: crops.float().mean((2, 3)), 3, 32, Loading(0), ranks, stop
        )
    ranks.wait()  # both are here: none waits in another collective
    return f"{stopped.value.exit_status} {stopped.value}"


def features_where_rank_1_has_a_broken_file(ranks: Ranks) -> str:
    """Also: it has other weights."""
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    network.weight.fill_(ranks.rank)
    network.bias.zero_()
    with pytest.raises(UserError, match=r"not every process finds the same weights in x\.pt"):
        require_same_weights(network, Path("x.pt"), ranks)
    images = of_colours(*[RED] * 600)
    images[3] = Path("/nowhere.png")
    stop = SimpleNamespace(requested=False, exit_status=143)
    with pytest.raises(UserError) as stopped:
        centre_features(
            images, lambda crops: crops.float().mean((2, 3)), 3, 32, Loading(0), ranks, stop
        )
    ranks.wait()  # both are here: none waits in another collective
    return str(stopped.value)


def test_a_broken_file_on_one_rank_ends_both(tmp_path: Path) -> None:
    others, own = on_two_ranks(features_where_rank_1_has_a_broken_file, tmp_path)
    assert others == "another process met a file that cannot be decoded"
    assert own.startswith("/nowhere.png cannot be")


def test_a_signal_to_one_rank_stops_both_at_the_same_batch(tmp_path: Path) -> None:
    for told in on_two_ranks(features_where_rank_1_has_a_signal, tmp_path):
        assert told.startswith("143 Stopped while features were extracted: the same command")
