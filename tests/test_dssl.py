"""Which views meet, in which direction, with which weight: the loss of section 3 of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.dssl import loss_parts
from common.losses.contrastive import nt_xent
from common.runtime.ranks import Ranks
from common.views import Views
from simsiam_cifar10.loss import pair_loss
from simsiam_cifar10.model import SimSiam

NAMES = ("v", "v'", "v̂", "v̂'")

# (whose prediction moves, towards whose projection, weight), written out from the paper.
SYMMETRIC = [("v", "v'", "symmetric"), ("v'", "v", "symmetric")]
EXPECTED = {
    "baseline": SYMMETRIC,
    "joint": [("v̂", "v̂'", "symmetric"), ("v̂'", "v̂", "symmetric")],
    "dssl": [*SYMMETRIC, ("v̂", "v", "asymmetric"), ("v̂'", "v'", "asymmetric")],
    "dssl, s > 0": [
        *SYMMETRIC,
        ("v̂", "v", "asymmetric"),
        ("v̂'", "v'", "asymmetric"),
        ("v", "v̂", "reverse"),
        ("v'", "v̂'", "reverse"),
    ],
}


def make_views(regime: str, batch: int = 6) -> Views:
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.rand(batch, 3, 8, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(4)
    ]
    return Views(*images) if regime != "baseline" else Views(*images[:2], None, None)


def make_network() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam("resnet18", width=8, projector_dim=8, predictor_dim=4).double()


ONE_TERM = partial(nt_xent, temperature=0.5, ranks=Ranks(0, 1, torch.device("cpu")))
PAIRS = [(case, *pair) for case, pairs in EXPECTED.items() for pair in pairs]


@pytest.mark.parametrize(("case", "source", "target", "term"), PAIRS)
def test_each_term_moves_its_source_view_and_nothing_else(
    case: str, source: str, target: str, term: str
) -> None:
    regime = case.split(",")[0]
    reverse_weight = 0.25 if "s > 0" in case else 0.0
    weights = {"symmetric": 1.0, "asymmetric": 1 - reverse_weight, "reverse": reverse_weight}
    views = make_views(regime)
    network = make_network()
    outputs: list[tuple[str, Tensor, Tensor]] = []
    met: list[tuple[str, str]] = []

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        p, z = network(view)
        position = next(index for index, other in enumerate(views) if other is view)
        outputs.append((NAMES[position], p, z))
        return p, z

    def only_this_pair(p: Tensor, z: Tensor) -> Tensor:
        mover = next(name for name, other, _ in outputs if other is p)
        goal = next(name for name, _, other in outputs if other is z)
        met.append((mover, goal))
        return pair_loss(p, z) if met[-1] == (source, target) else 0 * p.sum()

    total, logged = 0.0, 0.0
    for part in loss_parts(network, forward, views, regime, only_this_pair, reverse_weight):
        part.loss.backward()
        total += part.loss.item()
        logged += part.log[term].item() if term in part.log else 0.0

    assert sorted(met) == sorted(pair[:2] for pair in EXPECTED[case])
    for name, view in zip(NAMES, views, strict=True):
        moved = view is not None and view.grad is not None and bool((view.grad != 0).any())
        assert moved == (name == source), f"{source} → {target}: gradient at {name}"
    assert logged != 0
    assert total == pytest.approx(weights[term] * logged, rel=1e-6)


@pytest.mark.parametrize(
    ("regime", "s"), [("baseline", 0.0), ("joint", 0.0), ("dssl", 0.0), ("dssl", 0.1)]
)
def test_gradients_are_those_of_the_whole_sum(regime: str, s: float) -> None:
    views = make_views(regime)
    network = make_network()
    log: dict[str, float] = {}
    loss = 0.0
    for part in loss_parts(network, network, views, regime, pair_loss, s):
        part.loss.backward()
        loss += part.loss.item()
        for name, value in part.log.items():
            log[name] = log.get(name, 0.0) + value.item()

    whole = make_network()
    outputs = [whole(view) if view is not None else None for view in views]

    def half_d(p: Tensor, z: Tensor) -> Tensor:
        z = z.detach()
        return (
            -0.5
            * ((p / p.norm(dim=1, keepdim=True)) * (z / z.norm(dim=1, keepdim=True)))
            .sum(dim=1)
            .mean()
        )

    if regime == "joint":
        (p_1, z_1), (p_2, z_2) = outputs[2:]
    else:
        (p_1, z_1), (p_2, z_2) = outputs[:2]
    expected = half_d(p_1, z_2) + half_d(p_2, z_1)
    if regime == "dssl":
        (p_3, z_3), (p_4, z_4) = outputs[2:]
        expected = expected + (1 - s) * (half_d(p_3, z_1) + half_d(p_4, z_2))
        if s:
            expected = expected + s * (half_d(p_1, z_3) + half_d(p_2, z_4))
    expected.backward()

    # `pair_loss` computes in float32, hence the tolerance.
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    parts = log["symmetric"] + (1 - s) * log.get("asymmetric", 0) + s * log.get("reverse", 0)
    assert loss == pytest.approx(parts, abs=1e-6)
    for (name, ours), theirs in zip(network.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


def test_gradients_are_added_to_those_before_also_where_the_parts_are_left_early() -> None:
    views = make_views("dssl")

    def gradients_after(counts: list[int]) -> list[Tensor | None]:
        network = make_network()
        for count in counts:
            for part in itertools.islice(loss_parts(network, network, views, "dssl", half), count):
                part.loss.backward()
        return [parameter.grad for parameter in network.parameters()]

    def half(p: Tensor, z: Tensor) -> Tensor:
        return (p - z.detach()).pow(2).mean()

    # The running averages change from step to step, but training does not use them.
    once, first, both = gradients_after([4]), gradients_after([1]), gradients_after([4, 1])
    for whole, part, total in zip(once, first, both, strict=True):
        assert torch.equal(total, whole + part)
        assert part.abs().sum() > 0


def test_spread_in_the_log_is_that_of_the_first_view() -> None:
    views = make_views("dssl")
    network = make_network()
    z = F.normalize(make_network()(views.standard_1)[1], dim=1)
    expected = z.std(dim=0, correction=0).mean().item() * 8**0.5
    logs = [part.log for part in loss_parts(network, network, views, "dssl", pair_loss, 0.1)]
    values = [log["spread"].item() for log in logs if "spread" in log]
    assert values == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize(
    ("symmetric_loss", "s", "alive_views"), [(None, 0.0, 2), (None, 0.1, 3), (ONE_TERM, 0.0, 2)]
)
def test_two_views_of_activations_are_alive_at_a_time_or_three_with_a_reverse_term(
    symmetric_loss: Callable[[Tensor, Tensor], Tensor] | None, s: float, alive_views: int
) -> None:
    """Bytes saved for backward, against those of all four views and of the baseline's two."""

    def peak_bytes(regime: str, together: bool) -> int:
        alive = peak = 0
        network = make_network()

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, peak
                self.tensor = tensor
                self.bytes = tensor.numel() * tensor.element_size()
                alive += self.bytes
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            views = make_views(regime)
            parts = loss_parts(
                network, network, views, regime, pair_loss, s, symmetric_loss=symmetric_loss
            )
            if together:
                sum(part.loss for part in list(parts)).backward()
            else:
                for part in parts:
                    part.loss.backward()
        return peak

    in_parts = peak_bytes("dssl", together=False)
    share = in_parts / peak_bytes("dssl", together=True)
    assert share == pytest.approx(alive_views / 4, rel=0.05)
    assert in_parts / peak_bytes("baseline", together=False) == pytest.approx(
        alive_views / 2, rel=0.1
    )


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()
        self.calls = itertools.count()

    def forward(self, view: Tensor) -> tuple[Tensor, Tensor]:
        next(self.calls)
        return self.network(view)


@pytest.mark.parametrize("symmetric_loss", [None, ONE_TERM])
@pytest.mark.parametrize(("regime", "passes"), [("baseline", 2), ("joint", 2), ("dssl", 4)])
def test_no_view_is_passed_twice_or_in_vain(
    regime: str, passes: int, symmetric_loss: Callable[[Tensor, Tensor], Tensor] | None
) -> None:
    network = Counted()
    s = 0.1 if symmetric_loss is None else 0.0
    views = make_views(regime)
    for part in loss_parts(
        network, network, views, regime, pair_loss, s, symmetric_loss=symmetric_loss
    ):
        part.loss.backward()
    assert next(network.calls) == passes


@pytest.mark.parametrize("regime", ["baseline", "joint", "dssl"])
def test_a_target_network_sees_each_target_view_once_and_gets_no_gradient(regime: str) -> None:
    views = make_views(regime)
    online, target_network = make_network(), make_network()
    for parameter in target_network.parameters():
        parameter.data.mul_(1.5)
    seen: list[int] = []

    def target(view: Tensor, z: Tensor) -> Tensor:
        seen.append(next(index for index, other in enumerate(views) if other is view))
        return target_network(view)[1]  # with a graph: the pair loss alone has to stop it

    loss = 0.0
    for part in loss_parts(online, online, views, regime, pair_loss, target=target):
        part.loss.backward()
        loss += part.loss.item()
    assert sorted(seen) == ([2, 3] if regime == "joint" else [0, 1])
    assert all(parameter.grad is None for parameter in target_network.parameters())

    first, second = views[2:] if regime == "joint" else views[:2]
    whole, other = make_network(), make_network()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    xi_1, xi_2 = other(first)[1], other(second)[1]
    expected = pair_loss(whole(first)[0], xi_2) + pair_loss(whole(second)[0], xi_1)
    if regime == "dssl":
        expected = expected + pair_loss(whole(views.heavy_1)[0], xi_1)
        expected = expected + pair_loss(whole(views.heavy_2)[0], xi_2)
    assert loss == pytest.approx(expected.item(), abs=1e-6)


# ---------------------------------------------------------------- L_S as one term over both views


@pytest.mark.parametrize(
    ("symmetric_loss", "movers"), [(None, [{"v"}, {"v'"}]), (ONE_TERM, [{"v", "v'"}])]
)
def test_the_symmetric_loss_goes_backward_first_and_each_part_moves_its_views_alone(
    symmetric_loss: Callable[[Tensor, Tensor], Tensor] | None, movers: list[set[str]]
) -> None:
    """Forward v, v', backward; forward v̂, backward; forward v̂', backward."""
    views = make_views("dssl")
    network = make_network()
    happened: list[str] = []

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        happened.append(NAMES[next(i for i, other in enumerate(views) if other is view)])
        return network(view)

    parts = loss_parts(network, forward, views, "dssl", pair_loss, symmetric_loss=symmetric_loss)
    for part, moved in zip(parts, (*movers, {"v̂"}, {"v̂'"}), strict=True):
        happened.append("backward " + " ".join(name for name in part.log if name != "spread"))
        part.loss.backward()
        for name, view in zip(NAMES, views, strict=True):
            assert (view.grad is not None and bool((view.grad != 0).any())) == (name in moved)
            view.grad = None
    assert happened == [
        *("v", "v'", *["backward symmetric"] * len(movers)),
        *("v̂", "backward asymmetric"),
        *("v̂'", "backward asymmetric"),
    ]


@pytest.mark.parametrize("regime", ["baseline", "joint", "dssl"])
def test_with_one_term_gradients_are_those_of_the_whole_sum(regime: str) -> None:
    views = make_views(regime)
    network = make_network()
    log: dict[str, float] = {}
    loss = 0.0

    def both(z_1: Tensor, z_2: Tensor) -> Tensor:  # moves the views by different amounts
        return (z_1 * z_2).sum(dim=1).sigmoid().mean() + z_1.pow(3).mean()

    def towards(p: Tensor, z: Tensor) -> Tensor:
        return (p - z.detach()).pow(2).mean()

    for part in loss_parts(network, network, views, regime, towards, symmetric_loss=both):
        part.loss.backward()
        loss += part.loss.item()
        for name, value in part.log.items():
            log[name] = log.get(name, 0.0) + value.item()

    whole = make_network()
    outputs = [whole(view) if view is not None else None for view in views]
    (_, z_1), (_, z_2) = outputs[2:] if regime == "joint" else outputs[:2]
    symmetric = both(z_1, z_2)
    asymmetric = torch.zeros(())
    if regime == "dssl":
        (p_3, _), (p_4, _) = outputs[2:]
        asymmetric = towards(p_3, z_1) + towards(p_4, z_2)
    (symmetric + asymmetric).backward()

    assert loss == pytest.approx(symmetric.item() + asymmetric.item(), rel=1e-12)
    assert log["symmetric"] == pytest.approx(symmetric.item(), rel=1e-12)
    assert log.get("asymmetric", 0.0) == pytest.approx(asymmetric.item(), rel=1e-12)
    directions = F.normalize(z_1, dim=1)
    spread = directions.std(dim=0, correction=0).mean().item() * 8**0.5
    assert log["spread"] == pytest.approx(spread, rel=1e-6)
    for (name, ours), theirs in zip(network.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is None:  # the predictor, where no heavy view is pulled
            assert ours.grad is None, name
        else:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("other", [{"symmetric_loss": ONE_TERM}, {"one_sided": True}])
@pytest.mark.parametrize("regime", ["baseline", "joint", "dssl"])
def test_a_reverse_weight_needs_two_pairs(regime: str, other: dict[str, object]) -> None:
    network = Counted()
    views = make_views(regime)
    parts = loss_parts(network, network, views, regime, pair_loss, 0.1, **other)
    with pytest.raises(ValueError, match="leave it at 0"):
        next(parts)
    assert next(network.calls) == 0


# ---------------------------------------------------------------- L_S that moves one view


@pytest.mark.parametrize(
    ("regime", "passed", "targets"),
    [
        ("baseline", ["v"], ["v'"]),
        ("joint", ["v̂"], ["v̂'"]),
        ("dssl", ["v", "v̂", "v̂'"], ["v", "v'"]),
    ],
)
def test_a_one_sided_loss_passes_the_second_view_through_the_target_network_only(
    regime: str, passed: list[str], targets: list[str]
) -> None:
    views = make_views(regime)
    online, key_network = make_network(), make_network()
    for parameter in key_network.parameters():
        parameter.data.mul_(1.5)
    seen: list[str] = []
    keys: dict[str, Tensor] = {}

    def name_of(view: Tensor) -> str:
        return NAMES[next(i for i, other in enumerate(views) if other is view)]

    def forward(view: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(name_of(view))
        return online(view)

    def target(view: Tensor, z: Tensor | None) -> Tensor:
        assert (z is None) == (name_of(view) in ("v'", "v̂'"))
        assert name_of(view) not in keys
        keys[name_of(view)] = key_network(view)[1]
        return keys[name_of(view)]

    loss = 0.0
    for part in loss_parts(
        online, forward, views, regime, pair_loss, target=target, one_sided=True
    ):
        part.loss.backward()
        loss += part.loss.item()
    assert seen == passed
    assert sorted(keys) == sorted(targets)
    assert all(parameter.grad is None for parameter in key_network.parameters())

    whole = make_network()
    first, second = views[2:] if regime == "joint" else views[:2]
    expected = 2 * pair_loss(whole(first)[0], keys[name_of(second)])
    if regime == "dssl":
        expected = expected + pair_loss(whole(views.heavy_1)[0], keys["v"])
        expected = expected + pair_loss(whole(views.heavy_2)[0], keys["v'"])
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for (name, ours), theirs in zip(online.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7), name
    moved = {
        name
        for name, view in zip(NAMES, views, strict=True)
        if view is not None and view.grad is not None and bool((view.grad != 0).any())
    }
    assert moved == set(passed)
