"""common/training/meter.py: sums and means exact, broken numbers stopped, requests heard."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from common.runtime.errors import UserError
from common.runtime.ranks import Ranks
from common.training.meter import Meter, require_finite

ALONE = Ranks(0, 1, torch.device("cpu"))
NO_REQUESTS = {"stop": False, "checkpoint": False}


class TwoRanks(Ranks):
    """One of two ranks; what the other one reports is fixed."""

    other: Tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.add_(self.other)


def of_two_ranks(other: list[float]) -> Ranks:
    ranks = TwoRanks(0, 2, torch.device("cpu"))
    object.__setattr__(ranks, "other", torch.tensor(other))  # Ranks is frozen
    return ranks


def run_step(meter: Meter, requests: dict[str, bool] = NO_REQUESTS, **values: float) -> None:
    meter.add({name: torch.tensor(value) for name, value in values.items()})
    meter.end_step(requests)
    meter.flush()  # on CUDA a step is read one step later


def test_sums_means_and_latest() -> None:
    meter = Meter(ALONE, {}, 0)
    assert meter.means() == {}
    for loss, spread in ((0.5, 1.0), (1.5, 0.25), (4.0, 0.25), (2.0, 0.5)):
        run_step(meter, loss=loss, spread=spread)
    assert meter.steps == 4
    assert meter.sums == {"loss": 8.0, "spread": 2.0}
    assert meter.means() == {"loss": 2.0, "spread": 0.5}
    assert meter.latest == {"loss": 2.0, "spread": 0.5}


def test_parts_of_a_step_add_up_by_name_and_do_not_reach_the_next_step() -> None:
    meter = Meter(ALONE, {}, 0)
    meter.add({"loss": torch.tensor(1.0), "symmetric": torch.tensor(0.25)})
    meter.add({"loss": torch.tensor(2.0)})
    meter.add({"loss": torch.tensor(-4.0), "symmetric": torch.tensor(0.5)})
    run_step(meter)
    assert meter.latest == {"loss": -1.0, "symmetric": 0.75}
    run_step(meter, loss=8.0, symmetric=1.0)
    assert meter.latest == {"loss": 8.0, "symmetric": 1.0}
    assert meter.sums == {"loss": 7.0, "symmetric": 1.75}


def test_what_was_added_is_not_changed() -> None:
    value = torch.tensor(1.0)
    meter = Meter(ALONE, {}, 0)
    meter.add({"loss": value})
    meter.add({"loss": torch.tensor(2.0)})
    run_step(meter)
    assert value == 1


def test_half_precision_values_are_summed_in_full() -> None:
    meter = Meter(ALONE, {}, 0)
    for _ in range(300):  # bfloat16 itself cannot count beyond 256
        meter.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
        meter.end_step(NO_REQUESTS)
    meter.flush()
    assert meter.sums == {"loss": 300.0}


def test_an_interrupted_epoch_goes_on_from_its_sums() -> None:
    whole, interrupted = Meter(ALONE, {}, 0), Meter(ALONE, {}, 0)
    losses = (0.1, 0.7, 1.3, 0.2, 0.9)
    for loss in losses:
        run_step(whole, loss=loss)
    for loss in losses[:3]:
        run_step(interrupted, loss=loss)
    saved = dict(interrupted.sums)
    continued = Meter(ALONE, saved, interrupted.steps)
    for loss in losses[3:]:
        run_step(continued, loss=loss)
    assert continued.sums == whole.sums  # bit for bit
    assert continued.steps == 5
    assert continued.means()["loss"] == pytest.approx(3.2 / 5, rel=1e-6)
    assert saved == interrupted.sums, "the sums handed in were written to"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_value_names_the_quantity_and_the_step(broken: float) -> None:
    meter = Meter(ALONE, {"loss": 3.0, "reverse": 1.0}, 7)  # seven steps before the interruption
    run_step(meter, loss=1.0, reverse=1.0)
    with pytest.raises(UserError, match=rf"the reverse became {broken} in step 9 of this epoch"):
        run_step(meter, loss=1.0, reverse=broken)


def test_a_request_is_heard_once_and_is_no_quantity() -> None:
    meter = Meter(ALONE, {}, 0)
    run_step(meter, {"stop": False, "checkpoint": False}, loss=1.0)
    assert not meter.take_request("stop")
    assert not meter.take_request("checkpoint")
    run_step(meter, {"stop": False, "checkpoint": True}, loss=1.0)
    run_step(meter, {"stop": False, "checkpoint": False}, loss=1.0)  # it is not forgotten meanwhile
    assert not meter.take_request("stop")
    assert meter.take_request("checkpoint")
    assert not meter.take_request("checkpoint")
    assert meter.sums == {"loss": 3.0}
    assert meter.latest == {"loss": 1.0}


def test_values_are_means_over_ranks_and_any_rank_may_ask() -> None:
    # The other rank reports a loss of 4 and a spread of 0.5, asks to stop and for no checkpoint.
    meter = Meter(of_two_ranks([4.0, 0.5, 1.0, 0.0]), {}, 0)
    run_step(meter, loss=1.0, spread=0.25)
    assert meter.sums == {"loss": 2.5, "spread": 0.375}
    assert meter.take_request("stop")
    assert not meter.take_request("checkpoint")


def test_another_ranks_broken_value_is_noticed_here() -> None:
    meter = Meter(of_two_ranks([math.nan, 0.0, 0.0]), {}, 0)
    with pytest.raises(UserError, match="the loss became nan in step 1"):
        run_step(meter, loss=1.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_named(broken: float) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    require_finite(network)
    with torch.no_grad():
        network[2].weight[1, 3] = broken
    with pytest.raises(UserError, match=r"2\.weight"):
        require_finite(network)
