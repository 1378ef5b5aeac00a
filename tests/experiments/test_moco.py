"""mocov2_imagenet against a plain loop, and its keys and gradients on two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mocov2_imagenet.run as script
from common.augment.imagenet import normalised
from common.dssl import loss_parts
from common.evaluation import photographs
from common.networks.ema import make_target
from common.runtime.errors import UserError
from common.runtime.ranks import Ranks, unwrap
from common.runtime.seeding import generator_for
from common.views import Regime, ViewMaker, Views
from mocov2_imagenet.loss import pair_loss
from mocov2_imagenet.model import MoCo, ShuffledKeys, checked_norm_batch
from processes import on_two_ranks
from scripts import state

BATCH, GROUP, QUEUE, DIMENSION = 8, 4, 20, 8
ONE = Ranks(0, 1, torch.device("cpu"))
REGIMES: tuple[Regime, ...] = ("baseline", "joint", "dssl")


def encode(network: MoCo, view: Tensor, order: Tensor, group: int = GROUP) -> Tensor:
    """Each image's row of length 1; images share statistics with their neighbours in `order`."""
    rows: dict[int, Tensor] = {}
    for part in order.split(group):
        pixels = normalised(view[part]).to(network.projector[0].weight.dtype)
        outputs = network.projector(network.backbone(pixels))
        rows |= zip(part.tolist(), outputs, strict=True)
    return F.normalize(torch.stack([rows[index] for index in range(len(view))]), dim=1)


@pytest.mark.parametrize("regime", REGIMES)
def test_three_steps_against_a_plain_loop(
    regime: Regime, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Update the key network, make keys, step, enqueue: weights, key weights and queue at the end.

    A queue of 20 and batches of 8: the third batch begins where the first one was.
    """
    seen: list[Views] = []

    class Recorder(ViewMaker):
        def views(self, batch: Any) -> Views:
            seen.append(super().views(batch))
            return seen[-1]

    monkeypatch.setattr(script, "ViewMaker", Recorder)
    # Four images of an untrained network differ little: in float32, rounding would hide mistakes.
    monkeypatch.setattr(script, "MoCo", lambda *arguments: MoCo(*arguments).double())
    for module in (script, photographs):
        monkeypatch.setattr(module, "normalised", lambda view: normalised(view).double())
    config = script.Config(
        data_root=str(folder),
        image_size=32,
        workers=0,
        regime=regime,
        backbone="resnet18",
        hidden_dim=16,
        projector_dim=DIMENSION,
        norm_batch=GROUP,
        ema_decay=0.7,
        queue_length=QUEUE,
        epochs=1,
        batch_size=BATCH,
        lr=0.002,
        max_steps=3,
        device="cpu",
        precision="fp32",
        run_dir=str(tmp_path),
    )
    script.main(config)

    torch.manual_seed(0)
    network = MoCo("resnet18", 16, DIMENSION, GROUP).double()
    queue = list(F.normalize(torch.randn(QUEUE, DIMENSION), dim=1).double())  # oldest first
    key_network = copy.deepcopy(network)
    start = copy.deepcopy(network.state_dict())
    optimiser = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9, weight_decay=1e-4)
    in_order = torch.arange(BATCH)

    def term(view: Tensor, keys: Tensor) -> Tensor:
        q = encode(network, view, in_order)
        losses = []
        for query, key in zip(q, keys, strict=True):
            logits = torch.stack([query @ key, *(query @ other for other in queue)]) / 0.2
            losses.append(logits.logsumexp(0) - logits[0])
        return sum(losses) / BATCH

    for step, views in enumerate(seen[-3:]):
        with torch.no_grad():
            for key, query in zip(key_network.parameters(), network.parameters(), strict=True):
                key.copy_(0.7 * key + 0.3 * query)
            order = torch.randperm(BATCH, generator=generator_for("keys", 0, 1, step))
            first, second = views[2:] if regime == "joint" else views[:2]
            positive = encode(key_network, second, order)
            own = encode(key_network, first, order)
        loss = term(first, positive)
        if regime == "dssl":
            loss = loss + 0.5 * term(views.heavy_1, own) + 0.5 * term(views.heavy_2, positive)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        queue = queue[BATCH:] + list(positive)

    saved = state(tmp_path)
    for name, theirs in (("model", network), ("keys", key_network)):
        for key, parameter in theirs.named_parameters():
            moved = (parameter - start[key]).norm()
            assert moved > 0, f"{name} {key}"
            apart = (saved[name][key] - parameter).norm()
            assert apart < 0.01 * moved, f"{name} {key}: {apart} of {moved}"
    held = saved["queue"]["keys"].roll(-int(saved["queue"]["position"]), dims=0)
    assert torch.allclose(held, torch.stack(queue).float(), rtol=0, atol=2e-3)
    assert not torch.equal(network.projector[0].weight, key_network.projector[0].weight)


# ---------------------------------------------------------------- two processes


def make_views() -> Views:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, 3, 32, 32)
    return Views(
        *(torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(4))
    )


def compose(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    return lambda view: then(first(view))


def steps(wrap: Callable[[nn.Module], nn.Module], ranks: Ranks) -> dict[str, Any]:
    """Of each regime: this rank's loss, keys and gradients, and the keys for the queue."""
    order = torch.tensor([3, 6, 0, 7, 2, 5, 4, 1])
    queue = F.normalize(torch.randn(QUEUE, DIMENSION, generator=torch.Generator().manual_seed(2)))
    result: dict[str, Any] = {}
    for regime in REGIMES:
        torch.manual_seed(0)
        model = wrap(MoCo("resnet18", 16, DIMENSION, GROUP))
        key_network = make_target(unwrap(model))
        keys = ShuffledKeys(
            lambda view, net=key_network: net.project(normalised(view)), order, ranks
        )
        made: list[Tensor] = []

        def target(view: Tensor, q: Tensor | None, keys=keys, made=made) -> Tensor:
            made.append(keys.of(view, q))
            return made[-1]

        def forward(view: Tensor, model=model) -> tuple[Tensor, Tensor]:
            return model(normalised(view))

        loss = torch.zeros(())
        views = Views(*(view[ranks.share(BATCH)] for view in make_views()))
        settings = {"queue": queue, "temperature": 0.2}
        for part in loss_parts(
            model,
            forward,
            views,
            regime,
            partial(pair_loss, **settings),
            0.0,
            target,
            one_sided=True,
        ):
            part.loss.backward()
            loss += part.loss.detach()
        gradients = {name: p.grad.clone() for name, p in unwrap(model).named_parameters()}
        result[regime] = {"loss": loss, "made": made, "second": keys.second, "grad": gradients}
        assert all(parameter.grad is None for parameter in key_network.parameters())
    return result


def on_a_rank(ranks: Ranks) -> dict[str, Any]:
    return steps(ranks.wrap, ranks)


def test_two_ranks_make_the_keys_and_the_gradients_of_one_process(tmp_path: Path) -> None:
    """A rank's share is a group of BatchNorm: statistics per process, images in another order."""
    results = on_two_ranks(on_a_rank, tmp_path)
    expected = steps(lambda network: network, ONE)
    order = torch.tensor([3, 6, 0, 7, 2, 5, 4, 1])
    torch.manual_seed(0)
    network = MoCo("resnet18", 16, DIMENSION, GROUP)
    for regime in REGIMES:
        one, ranks = expected[regime], [result[regime] for result in results]
        second = make_views()[3 if regime == "joint" else 1]
        by_hand = encode(network, second, order)
        unshuffled = encode(network, second, torch.arange(BATCH))
        assert (by_hand - unshuffled).abs().max() > 0.01, "the order has to make a difference"
        for result in ranks:
            torch.testing.assert_close(result["second"], by_hand, rtol=0, atol=1e-5)
            assert torch.equal(result["second"], ranks[0]["second"])
        assert len(one["made"]) == (2 if regime == "dssl" else 1)
        for index, keys in enumerate(one["made"]):
            joined = torch.cat([result["made"][index] for result in ranks])
            torch.testing.assert_close(joined, keys, rtol=0, atol=1e-5)
        loss = (ranks[0]["loss"] + ranks[1]["loss"]) / 2
        torch.testing.assert_close(loss, one["loss"], rtol=1e-5, atol=0)
        for name, gradient in one["grad"].items():
            assert torch.equal(ranks[0]["grad"][name], ranks[1]["grad"][name]), name
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                ranks[0]["grad"][name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name
            )


def test_groups_are_at_most_a_process_s_share(capsys: pytest.CaptureFixture[str]) -> None:
    for processes, used in ((4, 32), (8, 32), (16, 16)):
        ranks = Ranks(0, processes, torch.device("cpu"))
        assert checked_norm_batch(32, 256, ranks) == used
        told = "BatchNorm takes the 16 images of a process, not 32.\n" * (used == 16)
        assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("batch_size", "norm_batch", "queue_length", "message"),
    [
        (8, 8, 20, "--norm-batch must be at least 2, less than --batch-size"),
        (8, 3, 20, "divide the 8 images of a process"),
        (8, 1, 20, "--norm-batch must be at least 2"),
        (24, 8, 20, "--queue-length must be at least --batch-size, 24"),
    ],
)
def test_settings_that_would_give_the_positive_key_away(
    batch_size: int, norm_batch: int, queue_length: int, message: str, tmp_path: Path
) -> None:
    config = script.Config(
        dataset="shapes",
        device="cpu",
        run_dir=str(tmp_path),
        batch_size=batch_size,
        norm_batch=norm_batch,
        queue_length=queue_length,
    )
    with pytest.raises(UserError, match=message):
        script.main(config)
