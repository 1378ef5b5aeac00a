"""common/evaluation/knn.py and common/evaluation/features.py against plain loops."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.data.in_memory import ImageSet
from common.evaluation import features, knn
from common.evaluation.features import extract_features
from common.evaluation.knn import QUERIES, knn_accuracy, knn_predict
from common.runtime.ranks import Ranks

torch.set_num_threads(1)

ALONE = Ranks(0, 1, torch.device("cpu"))


def predict_by_loop(
    queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, weighted: bool = True
) -> list[int]:
    bank_rows = bank.double().numpy()
    predictions = []
    for query in queries.double().numpy():
        cosines = []
        for row in bank_rows:
            cosines.append((query @ row) / math.sqrt((query @ query) * (row @ row)))
        votes = [0.0] * classes
        for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[int(labels[index])] += math.exp(cosines[index] / 0.1) if weighted else 1.0
        predictions.append(votes.index(max(votes)))
    return predictions


def random_problem(
    queries: int, bank: int, dim: int = 6, classes: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, bank and labels that hang together loosely; lengths differ widely."""
    generator = Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (bank,), generator=generator)
    rows = centres[labels] + 1.5 * torch.randn(bank, dim, generator=generator)
    asked = torch.randn(queries, dim, generator=generator)
    rows *= 10 ** torch.empty(bank, 1).uniform_(-2, 2, generator=generator)
    asked *= 10 ** torch.empty(queries, 1).uniform_(-2, 2, generator=generator)
    return asked, rows, labels


# ---------------------------------------------------------------- prediction


def test_prediction_equals_the_loop() -> None:
    queries, bank, labels = random_problem(120, 450)
    expected = predict_by_loop(queries, bank, labels, 5, k=200)
    predicted = knn_predict(queries, bank, labels, 5)  # k = 200 and τ = 0.1 by default
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == expected
    # The problem can tell: votes without weights, or a vote of all, give other classes.
    assert predict_by_loop(queries, bank, labels, 5, k=200, weighted=False) != expected
    assert predict_by_loop(queries, bank, labels, 5, k=450, weighted=False) != expected
    assert set(expected) == {0, 1, 2, 3, 4}


def test_exactly_200_neighbours_vote() -> None:
    """In units of e^10 the votes are 1 (99 rows, class 0), 0.985 (101, class 1), 0.98 (9, class 0).

    After 199 neighbours class 0 leads with 99 to 98.5, after 200 class 1 with 99.485 to 99, after
    201 class 0 again with 99.98.
    """
    cosine = torch.tensor([1 + 0.1 * math.log(vote) for vote in (1, 0.985, 0.98)])
    kinds = torch.tensor([0] * 99 + [1] * 101 + [2] * 9)
    bank = torch.stack([cosine, (1 - cosine.square()).sqrt()], dim=1)[kinds]
    labels = torch.tensor([0, 1, 0])[kinds]
    order = torch.randperm(209, generator=Generator().manual_seed(0))
    query = torch.tensor([[1.0, 0.0]])
    predicted = {
        k: knn_predict(query, bank[order], labels[order], 2, neighbours=k).item()
        for k in (199, 200, 201)
    }
    assert predicted == {199: 0, 200: 1, 201: 0}
    assert knn_predict(query, bank[order], labels[order], 2).item() == 1


@pytest.mark.parametrize("k", [1, 7, 60, 61, 200])
def test_a_bank_smaller_than_k_votes_whole(k: int) -> None:
    queries, bank, labels = random_problem(40, 60)
    expected = predict_by_loop(queries, bank, labels, 5, k=min(k, 60))
    assert knn_predict(queries, bank, labels, 5, neighbours=k).tolist() == expected


def test_votes_by_hand() -> None:
    # Cosines with (1, 0): 1, 0.6, 0.6; votes e^10 for class 0 and 2·e^6 for class 1. At τ = 1 they
    # are e and 2·e^0.6 = 1.34 e.
    bank = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[5.0, 0.0]])
    assert knn_predict(query, bank, labels, 2).tolist() == [0]
    assert knn_predict(query, bank, labels, 2, temperature=1.0).tolist() == [1]
    assert knn_predict(query, bank, labels, 2, neighbours=2, temperature=1.0).tolist() == [0]


def test_equal_votes_go_to_the_lower_class() -> None:
    # Axes have cosines of exactly 0 and 1, so the votes are equal to the bit.
    bank = torch.eye(4)
    labels = torch.tensor([3, 1, 2, 0])
    between = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    assert knn_predict(between, bank, labels, 4, neighbours=2).tolist() == [1, 1, 2]


def test_half_precision_features_are_compared_in_fp32() -> None:
    queries, bank, labels = random_problem(60, 300)
    queries, bank = queries.bfloat16(), bank.bfloat16()
    expected = predict_by_loop(queries, bank, labels, 5, k=200)
    assert knn_predict(queries, bank, labels, 5).tolist() == expected


def test_the_features_are_not_changed() -> None:
    queries, bank, labels = random_problem(20, 30)
    before = queries.clone(), bank.clone(), labels.clone()
    knn_predict(queries, bank, labels, 5)
    assert all(map(torch.equal, (queries, bank, labels), before))


@pytest.mark.parametrize("count", [1, QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES + 3])
def test_blocks_of_queries_join_in_order(count: int) -> None:
    queries, bank, labels = random_problem(2 * QUERIES + 3, 40)
    one_by_one = [
        knn_predict(query[None], bank, labels, 5, neighbours=9) for query in queries[:count]
    ]
    assert torch.equal(
        knn_predict(queries[:count], bank, labels, 5, neighbours=9), torch.cat(one_by_one)
    )


class Memory(TorchDispatchMode):
    """Measures the largest result of an operation, and the most that results held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # elements
        self.peak = 0  # bytes
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        for tensor in results:
            self.largest = max(self.largest, tensor.numel())
        self._results += map(weakref.ref, results)
        alive = [tensor for tensor in (found() for found in self._results) if tensor is not None]
        storages = [tensor.untyped_storage() for tensor in alive]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}  # views share one
        self.peak = max(self.peak, sum(held.values()))
        return result


def memory_of(queries: int) -> Memory:
    asked, bank, labels = random_problem(queries, 700)
    with Memory() as memory:
        knn_predict(asked, bank, labels, 5)
    return memory


def test_memory_is_one_block_of_similarities_however_many_queries() -> None:
    part, two_blocks, many = (memory_of(count) for count in (100, 2 * QUERIES, 5 * QUERIES + 1))
    assert part.largest == 100 * 700  # the measurement sees the matrix of similarities
    assert two_blocks.largest == QUERIES * 700
    assert many.largest == QUERIES * 700
    # What is kept of a query: its six numbers normalised, and its class; not 700 similarities.
    assert many.peak - two_blocks.peak < (3 * QUERIES + 1) * 100


# ---------------------------------------------------------------- features of a whole set


class Rows(nn.Module):
    """A backbone whose feature is the image's first row of one channel; has a mode to restore."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0].double()


def image_set(labels: list[int], seed: int, classes: int = 3) -> ImageSet:
    """Images that differ, each class leaning towards columns of its own."""
    generator = Generator().manual_seed(seed)
    images = torch.randint(0, 120, (len(labels), 3, 6, 6), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, 0, 2 * label] += 100
    names = tuple(str(number) for number in range(classes))
    return ImageSet(images, torch.tensor(labels), names)


def nothing() -> None:
    pass


@pytest.mark.parametrize("count", [1, 5, 20, 23])
def test_features_of_every_image_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 5)
    images = image_set([0] * count, seed=0).images
    sizes, checks = [], []

    def encode(chunk: Tensor) -> Tensor:
        assert len(checks) == len(sizes) + 1, "check is called before each chunk"
        sizes.append(len(chunk))
        return backbone(chunk)

    backbone = Rows()
    result = extract_features(backbone, images, encode, ALONE, lambda: checks.append(None))
    assert torch.equal(result, images[:, 0, 0].float())
    assert result.dtype == torch.float32
    assert sizes == [5] * (count // 5) + [count % 5] * (count % 5 > 0)


def test_the_ranks_shares_are_the_set_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 4)
    images = image_set([0] * 25, seed=0).images  # 3 ranks: chunks of 12, 12 and 1
    for rank in range(3):
        checks = []
        ranks = Ranks(rank, 3, torch.device("cpu"))
        share = extract_features(Rows(), images, Rows(), ranks, lambda: checks.append(None))  # noqa: B023
        expected = [images[index, 0, 0].tolist() for index in range(rank, 25, 3)]
        assert share.tolist() == expected
        assert len(checks) == 3, "all ranks wait for each other equally often"
    ranks = Ranks(1, 2, torch.device("cpu"))  # fewer images than ranks
    assert extract_features(Rows(), images[:1], Rows(), ranks, nothing).shape == (0, 6)


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_sees_eval_mode_and_the_mode_comes_back(was_training: bool) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4)).train(was_training)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    images = image_set([0] * 9, seed=0).images
    modes = []

    def encode(chunk: Tensor) -> Tensor:
        modes.append([module.training for module in backbone.modules()])
        return backbone(chunk.float())

    result = extract_features(backbone, images, encode, ALONE, nothing)
    assert modes == [[False] * 4]
    assert [module.training for module in backbone.modules()] == [was_training] * 4
    assert not result.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_a_stop_comes_through_and_the_mode_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 5)
    encoded = []

    def stop_in_the_third_chunk() -> None:
        if len(encoded) == 2:
            raise InterruptedError

    backbone = Rows().train()

    def encode(chunk: Tensor) -> Tensor:
        encoded.append(len(chunk))
        return backbone(chunk)

    with pytest.raises(InterruptedError):
        extract_features(
            backbone, image_set([0] * 23, 0).images, encode, ALONE, stop_in_the_third_chunk
        )
    assert encoded == [5, 5]
    assert backbone.training


# ---------------------------------------------------------------- accuracy


def test_accuracy_counts_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that no chunk and no block divides, so that a dropped batch would show."""
    monkeypatch.setattr(features, "CHUNK", 5)
    monkeypatch.setattr(knn, "QUERIES", 4)
    generator = numpy.random.default_rng(0)
    train = image_set(generator.integers(0, 3, 23).tolist(), seed=1)
    test = image_set(generator.integers(0, 3, 31).tolist(), seed=2)
    backbone = Rows()
    seen: list[Tensor] = []

    def encode(chunk: Tensor) -> Tensor:
        seen.extend(chunk)
        return backbone(chunk)

    accuracy = knn_accuracy(backbone, train, test, encode, ALONE, nothing)

    def rows(images: ImageSet) -> Tensor:
        return images.images[:, 0, 0]

    predictions = predict_by_loop(rows(test), rows(train), train.labels, 3, k=200)
    right = sum(p == label for p, label in zip(predictions, test.labels.tolist(), strict=True))
    assert 0 < right < 31
    assert accuracy == pytest.approx(100 * right / 31, rel=1e-12)
    assert torch.equal(torch.stack(seen), torch.cat([train.images, test.images]))
