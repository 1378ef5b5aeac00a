"""Two real processes under gloo against one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from common.data.in_memory import ImageSet
from common.dssl import loss_parts
from common.evaluation.features import extract_features
from common.evaluation.knn import knn_accuracy, knn_predict
from common.losses.contrastive import nt_xent
from common.networks.ema import make_target
from common.runtime import launch
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks, unwrap
from common.training.meter import Meter
from common.training.run_folder import RunLog
from common.views import Views
from processes import spawn_ranks
from simclr_cifar10.loss import pair_loss as info_nce
from simclr_cifar10.model import SimCLR
from simsiam_cifar10.loss import pair_loss
from simsiam_cifar10.model import SimSiam

Network = TypeVar("Network", bound=nn.Module)

BATCH = 32
BYOL = -1.0  # in place of s: targets by a target network
REGIMES = ("baseline", "joint", "dssl")
CASES = [
    *[(regime, s) for regime in REGIMES for s in (0.0, BYOL)],
    ("dssl", 0.1),
]


def without_norm(network: Network) -> Network:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return network


def make_network(norm: bool) -> SimSiam:
    torch.manual_seed(0)
    network = SimSiam("resnet18", width=8, projector_dim=8, predictor_dim=4)
    return network if norm else without_norm(network)


def make_simclr() -> SimCLR:
    torch.manual_seed(0)
    return without_norm(SimCLR("resnet18", width=8, hidden_dim=16, projector_dim=8))


def make_views() -> Views:
    generator = torch.Generator().manual_seed(1)
    return Views(*(torch.randn(BATCH, 3, 16, 16, generator=generator) for _ in range(4)))


def gradients(model: nn.Module, views: Views, regime: str, s: float) -> dict[str, torch.Tensor]:
    target_network = make_target(unwrap(model))
    with torch.no_grad():
        for parameter in target_network.parameters():
            parameter.mul_(1.5)  # a copy would give the targets of a method without one

    def target(view: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return target_network(view)[1] if s < 0 else z

    for part in loss_parts(model, model, views, regime, pair_loss, max(s, 0), target):
        part.loss.backward()
    return {name: p.grad.clone() for name, p in unwrap(model).named_parameters()}


def simclr_step(model: nn.Module, views: Views, regime: str, ranks: Ranks) -> dict[str, Any]:
    """The gradients, the loss and the order of passes, with those forward that make DDP join."""
    passes: list[str] = []

    def forward(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joins = getattr(model, "require_backward_grad_sync", False)
        passes.append("forward, joined" if joins else "forward")
        return model(view)

    loss = torch.zeros(())
    pull_heavy = partial(info_nce, temperature=0.5, ranks=ranks)
    symmetric_loss = partial(nt_xent, temperature=0.5, ranks=ranks)
    for part in loss_parts(
        model, forward, views, regime, pull_heavy, symmetric_loss=symmetric_loss
    ):
        passes.append("backward")
        part.loss.backward()
        loss += part.loss.detach()
    grads = {name: p.grad.clone() for name, p in unwrap(model).named_parameters()}
    return {"loss": loss, "passes": passes, "gradients": grads}


def slices(views: Views, rows: slice) -> Views:
    return Views(*(view[rows] for view in views))


def images_and_labels(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(3, (count,), generator=generator), ("a", "b", "c"))


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).float()


def far_labels() -> torch.Tensor:
    """Of 47 images: none is of class 0."""
    return torch.arange(47) % 2 + 1


def on_a_rank(rank: int, folder: Path) -> None:
    ranks = launch.start("cpu")
    rows = ranks.share(BATCH)
    result: dict[str, object] = {"rows": (rows.start, rows.stop)}
    for norm in (True, False):
        for regime, s in CASES:
            model = ranks.wrap(make_network(norm))
            grads = gradients(model, slices(make_views(), rows), regime, s)
            result[f"{norm} {regime} {s}"] = grads
    for regime in REGIMES:
        model = ranks.wrap(make_simclr())
        result[f"simclr {regime}"] = simclr_step(model, slices(make_views(), rows), regime, ranks)

    mine = torch.arange(12.0).view(4, 3)[rank * 2 :][:2].requires_grad_()
    joined = ranks.join_batch(mine)
    ((rank + 1) * joined * torch.arange(12.0).view(4, 3)).sum().backward()
    result["joined"], result["joined gradient"] = joined.detach(), mine.grad

    network = make_network(norm=True)
    for buffer in network.buffers():
        buffer.fill_(rank + 1)
    ranks.broadcast_buffers(network)
    result["buffers"] = sorted({float(value) for b in network.buffers() for value in b.flatten()})

    train, test = images_and_labels(47, 0), images_and_labels(33, 1)
    backbone = nn.Identity()
    features = extract_features(backbone, train.images, pixels, ranks, lambda: None)
    result["gathered"] = ranks.gather(features, len(train))
    result["knn"] = knn_accuracy(backbone, train, test, pixels, ranks, lambda: None)

    mine = slice(rank, None, 2)
    result["nearest 5"] = knn_predict(
        pixels(test.images),
        pixels(train.images[mine]),
        train.labels[mine],
        3,
        neighbours=5,
        ranks=ranks,
    )

    # Fewer neighbours than k on each rank, all of them far away: what fills up must not vote.
    torch.manual_seed(0)
    bank, queries = torch.rand(47, 5), -torch.rand(9, 5)
    result["few"] = knn_predict(queries, bank[mine], far_labels()[mine], 3, ranks=ranks)
    result["few alone"] = knn_predict(queries, bank, far_labels(), 3)

    meter = Meter(ranks, {}, 0)
    meter.add({"loss": torch.tensor(float(rank))})
    meter.end_step({"stop": rank == 1, "checkpoint": False})
    result["mean"] = meter.means()["loss"]
    result["requests"] = (meter.take_request("stop"), meter.take_request("checkpoint"))
    result["any"] = (ranks.any(rank == 1), ranks.any(False))
    same, other = {"epoch": 3, "sums": {"loss": 0.1}}, {"epoch": 3 + rank}
    only_first = None if rank else same
    result["agree"] = [ranks.agree(state) for state in (None, same, other, only_first)]
    # Folders of its own for each rank, as on machines without a common file system.
    log = RunLog(folder / f"run{rank}", {}, {}, False, ranks)
    if ranks.is_main:
        log.checkpoints.save({"config": {}, "metrics": "", "progress": {"epoch": 50}})
    result["folder"] = str(log.folder)
    try:
        log.load_checkpoint()
    except UserError as error:
        result["other checkpoints"] = str(error)
    torch.save(result, folder / f"{rank}.pt")
    launch.finish()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn_ranks(on_a_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("regime", "s"), CASES)
def test_two_ranks_equal_one_process_that_averages_two_halves(
    results: list[dict], regime: str, s: float
) -> None:
    views = make_views()
    torch.set_num_threads(1)  # as the ranks: sums in the same order
    halves = [
        gradients(make_network(True), slices(views, rows), regime, s)
        for rows in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))
    ]
    key = f"True {regime} {s}"
    for name in halves[0]:
        expected = (halves[0][name] + halves[1][name]) / 2
        assert torch.equal(results[0][key][name], results[1][key][name]), name
        assert torch.allclose(results[0][key][name], expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(("regime", "s"), CASES)
def test_without_batch_norm_two_ranks_equal_the_joined_batch(
    results: list[dict], regime: str, s: float
) -> None:
    expected = gradients(make_network(False), make_views(), regime, s)
    for name, gradient in expected.items():
        ours = results[0][f"False {regime} {s}"][name]
        assert torch.allclose(ours, gradient, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("regime", REGIMES)
def test_simclrs_negatives_on_two_ranks_are_those_of_the_joined_batch(
    results: list[dict], regime: str
) -> None:
    one = Ranks(0, 1, torch.device("cpu"))
    expected = simclr_step(make_simclr(), make_views(), regime, one)
    ours = [result[f"simclr {regime}"] for result in results]
    assert torch.allclose((ours[0]["loss"] + ours[1]["loss"]) / 2, expected["loss"], atol=1e-6)
    for name, gradient in expected["gradients"].items():
        first, second = (step["gradients"][name] for step in ours)
        assert torch.equal(first, second), name
        assert torch.allclose(first, gradient, rtol=1e-4, atol=1e-6), name


def test_gradients_are_joined_once_a_step(results: list[dict]) -> None:
    last = ["forward, joined", "backward"]
    for result in results:
        for regime in ("baseline", "joint"):
            assert result[f"simclr {regime}"]["passes"] == ["forward", *last]
        passes = result["simclr dssl"]["passes"]
        assert passes == ["forward", "forward", "backward", "forward", "backward", *last]


def test_a_joined_batch_gives_each_rank_the_gradients_of_all(results: list[dict]) -> None:
    rows = torch.arange(12.0).view(4, 3)
    for rank, result in enumerate(results):
        assert torch.equal(result["joined"], rows)
        # rank 0's loss weighs 1, rank 1's 2
        assert torch.equal(result["joined gradient"], 3 * rows[rank * 2 :][:2])


def test_ranks_share_the_batch_in_order(results: list[dict]) -> None:
    assert [result["rows"] for result in results] == [(0, 16), (16, 32)]
    with pytest.raises(UserError, match="multiple of 2"):
        Ranks(0, 2, torch.device("cpu")).share(7)


def test_buffers_become_those_of_rank_0(results: list[dict]) -> None:
    assert [result["buffers"] for result in results] == [[1.0], [1.0]]


def test_features_are_joined_in_order_and_knn_counts_each_image_once(results: list[dict]) -> None:
    train, test = images_and_labels(47, 0), images_and_labels(33, 1)
    one = Ranks(0, 1, torch.device("cpu"))
    expected = knn_accuracy(nn.Identity(), train, test, pixels, one, lambda: None)
    nearest = knn_predict(pixels(test.images), pixels(train.images), train.labels, 3, neighbours=5)
    for result in results:
        assert torch.equal(result["nearest 5"], nearest)
        assert torch.equal(result["few"], result["few alone"])
        assert 0 not in result["few"]
        assert torch.equal(result["gathered"], pixels(train.images))
        assert result["knn"] == expected


def test_every_rank_learns_of_means_and_requests(results: list[dict]) -> None:
    for result in results:
        assert result["mean"] == 0.5
        assert result["requests"] == (True, False)
        assert result["any"] == (True, False)


def test_ranks_tell_whether_they_hold_the_same(results: list[dict]) -> None:
    for rank, result in enumerate(results):
        assert result["agree"] == [True, True, False, False]
        assert f"the same checkpoint in {result['folder']}" in result["other checkpoints"]
        assert result["folder"].endswith(f"run{rank}")
