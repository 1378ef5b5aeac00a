"""The directional loss L = L_S(v, v') + L_A(v̂ → v) + L_A(v̂' → v'), section 3 of the paper.

A base method brings a network and a pair loss; the regime decides which views meet, and in which
direction. The terms are handed out in parts, each to go backward before the next forward pass:
targets carry no gradient, so the gradients are those of the whole sum, while the activations of
two views are alive at a time instead of four. An L_S that is one term over both views goes backward
before the heavy ones are passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from common.losses.collapse import spread
from common.runtime.ranks import no_sync
from common.views import Regime, Views


class Part(NamedTuple):
    """Terms of the loss that can go backward together.

    `loss` is their weighted sum; `log` holds each term unweighted and detached, to be summed by
    name over the parts of a step: L = symmetric + (1 − s) · asymmetric + s · reverse.
    """

    loss: Tensor
    log: dict[str, Tensor]


def own_projection(view: Tensor, z: Tensor) -> Tensor:
    """The target of methods without a target network: the view's own projection."""
    return z


def loss_parts(
    model: nn.Module,
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    views: Views,
    regime: Regime,
    pair_loss: Callable[[Tensor, Tensor], Tensor],
    reverse_weight: float = 0.0,
    target: Callable[[Tensor, Tensor], Tensor] = own_projection,
    symmetric_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Part]:
    """Yield the parts of a step's loss; call `part.loss.backward()` before asking for the next.

    Args:
        model: what `forward` calls; under DDP its gradients are reduced with the last part only.
        forward: a view `[B, 3, H, W]` to prediction p and projection z, each `[B, d]`.
        views: from a `ViewMaker` of the same regime.
        regime: baseline joins the standard views, joint the heavy ones, symmetrically; dssl adds
            to the baseline each heavy view's pull towards its source.
        pair_loss: moves the prediction in its first argument towards the target in its second; no
            gradient reaches the target.
        reverse_weight: s, 0..1: the share of each asymmetric term that pulls the standard view
            towards its heavy one instead.
        target: a view and its z to what others are pulled towards, `[B, d]`: z itself, or ξ by a
            target network. Called once for each view that is a target, and for no other.
        symmetric_loss: L_S as one term over both views' projections, gradient to both, such as
            NT-Xent; None: each prediction is pulled towards the other view's target.

    Raises:
        ValueError: for a reverse weight above 0 beside `symmetric_loss`.
    """
    if symmetric_loss is not None and reverse_weight > 0:
        raise ValueError(
            f"a reverse weight of {reverse_weight} does not go with an L_S that is one term: it "
            "goes backward before there are heavy views to be pulled to; leave it at 0"
        )
    if regime != "dssl":
        first, second = views[2:] if regime == "joint" else views[:2]
        with no_sync(model):
            p_1, z_1 = forward(first)
        p_2, z_2 = forward(second)
        if symmetric_loss is None:
            symmetric = pair_loss(p_1, target(second, z_2)) + pair_loss(p_2, target(first, z_1))
        else:
            symmetric = symmetric_loss(z_1, z_2)
        yield Part(symmetric, {"symmetric": symmetric.detach(), "spread": spread(z_1)})
        return

    if symmetric_loss is not None:
        with no_sync(model):
            _, z_1 = forward(views.standard_1)
            _, z_2 = forward(views.standard_2)
            symmetric = symmetric_loss(z_1, z_2)
            yield Part(symmetric, {"symmetric": symmetric.detach(), "spread": spread(z_1)})

            p_heavy, _ = forward(views.heavy_1)
            asymmetric = pair_loss(p_heavy, target(views.standard_1, z_1))
            yield Part(asymmetric, {"asymmetric": asymmetric.detach()})

        p_heavy, _ = forward(views.heavy_2)
        asymmetric = pair_loss(p_heavy, target(views.standard_2, z_2))
        yield Part(asymmetric, {"asymmetric": asymmetric.detach()})
        return

    s = reverse_weight
    with no_sync(model):
        p_1, z_1 = forward(views.standard_1)
        p_heavy, z_heavy = forward(views.heavy_1)
        target_1 = target(views.standard_1, z_1)
        asymmetric = pair_loss(p_heavy, target_1)
        log = {"asymmetric": asymmetric.detach(), "spread": spread(z_1)}
        yield Part((1 - s) * asymmetric, log)

        p_2, z_2 = forward(views.standard_2)
        target_2 = target(views.standard_2, z_2)
        symmetric = pair_loss(p_1, target_2)
        loss, log = symmetric, {"symmetric": symmetric.detach()}
        if s > 0:
            reverse = pair_loss(p_1, target(views.heavy_1, z_heavy))
            loss, log["reverse"] = loss + s * reverse, reverse.detach()
        yield Part(loss, log)

    p_heavy, z_heavy = forward(views.heavy_2)
    symmetric, asymmetric = pair_loss(p_2, target_1), pair_loss(p_heavy, target_2)
    loss = symmetric + (1 - s) * asymmetric
    log = {"symmetric": symmetric.detach(), "asymmetric": asymmetric.detach()}
    if s > 0:
        reverse = pair_loss(p_2, target(views.heavy_2, z_heavy))
        loss, log["reverse"] = loss + s * reverse, reverse.detach()
    yield Part(loss, log)
